"""Text for calibration and evaluation: documents, and windows of tokens cut from them."""

from gptvq_jax.data.corpora import documents
from gptvq_jax.data.windows import calibration_windows, evaluation_windows

__all__ = ["calibration_windows", "documents", "evaluation_windows"]
