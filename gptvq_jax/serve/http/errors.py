"""Errors as OpenAI's API has them: a status, and JSON that names the field."""

from typing import Any


class APIError(Exception):
    """What a client is told in the place of an answer.

    Args:
      status: of HTTP.
      message: one line that says what to change.
      param: the field of the request that is wrong, if one is.
      code: a word for programs, if there is one.
      headers: of HTTP, beside those of every answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The object of the answer."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status)
        return {
            "error": {
                "message": str(self),
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def bad_field(param: str, message: str, code: str | None = None) -> APIError:
    """Of a field of the request; the message begins with its name."""
    return APIError(400, f"{param} {message}", param, code)
