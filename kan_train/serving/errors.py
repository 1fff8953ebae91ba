"""Refusals as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

CLIENT_GONE = 499
"""Status of a request whose client has left (nginx's number): nobody reads it, the metrics count it."""


class ApiError(Exception):
    """A request is refused, or cannot be finished."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        """status: of HTTP. param: the field that is wrong. code: a word for programs."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
