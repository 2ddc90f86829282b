"""The client of the Hub, and error messages that say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled


API = HfApi(library_name="trl_dpg")


@contextmanager
def explained(repo_id: str, token: str | None, advice: str) -> Iterator[None]:
    """
    Turns any error into a [`RuntimeError`] that names the repository, the Hub's answer, a remedy and `advice` of the caller.

    The token is removed from all messages.
    """
    try:
        yield
    except Exception as error:  # the client's HTTP library has errors of its own
        if type(error) is ValueError:  # raised by this package for a wrong argument; the client raises subclasses
            raise
        chain = list(_chain(error))
        reason, remedy = _reason(chain)
        message = f"The push to {repo_id!r} on {API.endpoint} failed: {reason} {remedy} {advice}"
        secrets = [secret for secret in (token, get_token()) if secret]
        for secret in secrets:
            message = message.replace(secret, "<token>")
        # The traceback would print the causes too, so causes with a token in them are left out.
        leaks = any(secret in str(cause) for secret in secrets for cause in chain)
        raise RuntimeError(message) from (None if leaks else error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}


def _reason(chain: list[BaseException]) -> tuple[str, str]:
    """What went wrong, and a remedy, as two sentences."""
    for error in chain:
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            said = f": {error.server_message.strip()}" if error.server_message else ""
            reason = f"the Hub answered {status} {error.response.reason_phrase}{said}".rstrip(".") + "."
            return reason, _REMEDIES.get(status, "Try again later, and see https://status.huggingface.co.")
        if isinstance(error, OfflineModeIsEnabled):
            return "offline mode is on.", "Unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE`."
        if isinstance(error, HFValidationError):
            return f"{error}".rstrip(".") + ".", "Correct the repository's name (`hub_model_id`)."
        if isinstance(error, LocalTokenNotFoundError):
            return "there is no token.", f"{_LOGIN[0].upper()}{_LOGIN[1:]}."
        if isinstance(error, OSError) and error.errno in _FULL:
            return f"{_FULL[error.errno]} ({error.strerror}).", "Free some space."
    first, last = chain[0], chain[-1]
    reason = f"{first} ({last})." if last is not first and str(last) else f"{first or type(first).__name__}."
    return (
        reason,
        "Check the network, and that no proxy or firewall is in the way. If Xet is blocked, `HF_HUB_DISABLE_XET=1` uploads by plain HTTP.",
    )


_LOGIN = "log in with `hf auth login`, set `HF_TOKEN`, or pass `hub_token` (`token` outside the trainer)"
_STORAGE = (
    "Free storage of the account or organization (https://huggingface.co/settings/billing), or push to another one with "
    "`hub_model_id`."
)
_REMEDIES = {
    400: "Correct what this answer names.",
    401: f"The token is missing, wrong or expired: make one with write permission at https://huggingface.co/settings/tokens and {_LOGIN}.",
    403: "The token may not write there: make one with write permission for this namespace at "
    f"https://huggingface.co/settings/tokens, and {_LOGIN}; or choose another `hub_model_id`.",
    404: f"The repository does not exist, or this token may not see it: check its name, and {_LOGIN}.",
    409: "Another commit was made at the same time.",
    413: _STORAGE,
    429: "Wait until the rate limit is over.",
    507: _STORAGE,
}
