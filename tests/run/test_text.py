"""Windows of a run's texts."""

import dataclasses

import numpy as np
import pytest

from gptvq_jax.config import CalibrationSettings, EvaluationSettings, RunSettings
from gptvq_jax.models.open import open_source
from gptvq_jax.run.text import (
    calibration_protocol,
    calibration_text,
    calibration_tokens,
    evaluation_tokens,
    protocol,
)

BOS = 7


def test_windows_begin_with_bos_where_the_settings_say_so(model_dir, text_files):
    """In place of their first token, and nothing else changes."""
    source = open_source(str(model_dir))
    plain = RunSettings(
        calibration=CalibrationSettings((text_files[0],), num_windows=3, held_out=1, seqlen=32),
        evaluation=EvaluationSettings(text_files[1], num_windows=2, seqlen=32),
    )
    begun = dataclasses.replace(
        plain,
        calibration=dataclasses.replace(plain.calibration, bos=True),
        evaluation=dataclasses.replace(plain.evaluation, bos=True),
    )
    for tokens in (calibration_tokens, evaluation_tokens):
        with pytest.raises(ValueError, match=r"no BOS token; set config\.\w+\.bos=False"):
            tokens(source, begun)
    source.tokenizer.bos_token = source.tokenizer.convert_ids_to_tokens(BOS)
    for tokens, count in ((calibration_tokens, 4), (evaluation_tokens, 2)):
        expected, windows = tokens(source, plain), tokens(source, begun)
        assert windows.shape == (count, 32) and windows.dtype == np.int32
        assert (windows[:, 0] == BOS).all() and (expected[:, 0] != BOS).any()
        np.testing.assert_array_equal(windows[:, 1:], expected[:, 1:])
    windows = evaluation_tokens(source, begun)
    assert protocol(source, text_files[1], windows)["bos"] == "first token of each window"
    said = calibration_protocol(begun.calibration)
    assert said["bos"] and calibration_text(said).endswith("; each begins with BOS")
    assert "bos" not in calibration_protocol(plain.calibration)
