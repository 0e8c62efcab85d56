"""A file that installed distributions carry in parts; small distributions are written here."""

import hashlib

import pytest

from gptvq_jax.console import user_cache
from gptvq_jax.data.packaged import joined_file
from gptvq_jax.files.disk_space import FullDiskError

CONTENT = bytes(range(256)) * 40
PARTS = [("some-part1", "some_part1/a.00"), ("some-part2", "some_part2/a.01")]
SUMS = "some", "some/SHA256SUMS"
INSTALL = "pip install some==1.0"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Where three distributions are installed, of which none can be imported; and a cache."""
    site = tmp_path / "site"
    digest = hashlib.sha256(CONTENT).hexdigest()
    files = {SUMS: f"{digest}  a.gguf\n".encode()}
    files |= dict(zip(PARTS, (CONTENT[:3000], CONTENT[3000:]), strict=True))
    for (name, path), content in files.items():
        module = name.replace("-", "_")
        (site / module).mkdir(parents=True)
        (site / path).write_bytes(content)
        (site / module / "__init__.py").write_text("raise RuntimeError('it was imported')")
        information = site / f"{module}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "cache"))
    return site


def test_parts_are_joined_once(site, tmp_path):
    path, digest = joined_file(SUMS, PARTS, INSTALL)
    assert path.read_bytes() == CONTENT and digest == hashlib.sha256(CONTENT).hexdigest()
    assert path.is_relative_to(tmp_path / "cache")
    before = path.stat()
    assert joined_file(SUMS, PARTS, INSTALL) == (path, digest)
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_damaged_cache_is_made_again(site):
    path, _ = joined_file(SUMS, PARTS, INSTALL)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert joined_file(SUMS, PARTS, INSTALL)[0].read_bytes() == CONTENT


def test_damaged_and_missing_parts_leave_nothing(site, tmp_path):
    (site / PARTS[1][1]).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"parts of a\.gguf.*pip install some==1\.0 --force-rein"):
        joined_file(SUMS, PARTS, INSTALL)
    assert not list((tmp_path / "cache").rglob("a.gguf*[!k]"))  # but for its lock

    (site / PARTS[1][1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"does not carry some_part2/a\.01; run: pip inst"):
        joined_file(SUMS, PARTS, INSTALL)
    with pytest.raises(FileNotFoundError, match=r"package other is not installed; run: pip inst"):
        joined_file(("other", "b"), PARTS, INSTALL)
    (site / SUMS[1]).write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"SHA256SUMS is damaged; reinstall it: pip install some"):
        joined_file(SUMS, PARTS, INSTALL)


def test_a_full_disk_is_named(site, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(FullDiskError, match=r"a\.gguf needs .* more"):
        joined_file(SUMS, PARTS, INSTALL)
