"""Sign tokens, and turn a token into a requirement: all commits up to the token's date, by the clock of this host."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from typing import TYPE_CHECKING

from aurora_router.config.settings import Settings
from aurora_router.core.positions import Requirement
from aurora_router.core.token_codec import LONGEST, SKEW, Token, strip_signature, strongest
from aurora_router.errors import ConfigurationError

if TYPE_CHECKING:
    from itsdangerous import Signer

_SALT = b"aurora_router.token"
# One SKEW is for the host that made the token. The other is for a host whose token it implies (core.token_codec.strongest()).
MARGIN = 2 * SKEW


class TokenRefused(ConfigurationError):
    """A text is not a consistency token, or not one that counts here.

    reason: why, in words that contain nothing of the text.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class Tokens:
    """Writes and reads the tokens of one router, and signs them if the settings have keys.

    ttl: seconds for which a token counts.
    """

    def __init__(self, settings: Settings) -> None:
        secrets = [key.encode() if isinstance(key, str) else key for key in settings.token_keys]
        self._signer = _signer(secrets) if secrets else None
        self.ttl = settings.token_ttl
        self._parse_once = functools.lru_cache(1024)(self._parse)  # a client sends the same token until it writes again
        # Two conversions of one moment between the clocks may differ by a millisecond.
        self._write_once = functools.lru_cache(1024)(self._write)

    def write(self, cluster: str, requirement: Requirement) -> str:
        """Return a token that carries the requirement. It is the same text each time."""
        return self._write_once(cluster, requirement)

    def _write(self, cluster: str, requirement: Requirement) -> str:
        ago = time.monotonic() - requirement.acknowledged_at
        if requirement.is_from_token and requirement.position is not None:
            # read() has taken this off the age. Undo that, because the position does not prove later commits.
            ago += MARGIN
        made_at = math.ceil((time.time() - ago) * 1000)
        text = str(Token(cluster, requirement.position, max(made_at, 0)))
        return self._signer.sign(text).decode() if self._signer is not None else text

    def read(self, text: str, cluster: str | None, argument: str = "token") -> Requirement | None:
        """Return what the token requires; None if it is older than `ttl`.

        cluster: the one that the token must be of; None if that is unknown.
        argument: the caller's name for the token.

        Raises TokenRefused for a token that is malformed, of another cluster, or not signed with one of the keys. It also
        refuses a date that is too far in the future. Such a token would count for more than twice its time.
        """
        if not isinstance(text, str) or len(text) > LONGEST or not text.isascii():
            raise TokenRefused("malformed", f"{argument}: a consistency token is a text of at most {LONGEST} ASCII characters")
        try:
            token = self._parse_once(text)
        except TokenRefused as refused:
            raise TokenRefused(refused.reason, f"{argument}: {refused}") from None
        if cluster is not None and token.cluster != cluster:
            message = f"{argument}: the consistency token is of another cluster ({token.cluster}, not {cluster})"
            raise TokenRefused("of another cluster", message)
        now, age = time.monotonic(), time.time() - token.made_at / 1000
        if -age > max(self.ttl, MARGIN):
            message = f"{argument}: the consistency token has a date more than {max(self.ttl, MARGIN):g} s in the future"
            raise TokenRefused("dated in the future", message)
        if age > self.ttl:
            return None
        after = now - max(age - MARGIN, 0.0)
        if token.position is None:
            return Requirement(after, None)
        return Requirement(after, token.position.epoch, token.position, is_from_token=True, received_at=now)

    def _parse(self, text: str) -> Token:
        if self._signer is not None:
            # Check the form first, because the signer ignores characters that are not of a signature's alphabet.
            bare = strip_signature(text)
            if bare is None or not self._signer.validate(text):
                message = "the consistency token is not signed with a key of this router"
                raise TokenRefused("not signed with a key of this router", message)
            text = bare
        try:
            return Token.parse(text)
        except ValueError:
            raise TokenRefused("malformed", "this is not a consistency token of a version that is known here") from None


def _signer(secrets: list[bytes]) -> Signer:
    try:
        from itsdangerous import Signer  # this takes 4 ms, so only signing routers do it
    except ImportError:
        raise ConfigurationError("token_keys need itsdangerous: pip install 'aurora-router[signing]'") from None

    return Signer(secrets, salt=_SALT, digest_method=hashlib.sha256)


def merge_tokens(*tokens: str | None) -> str | None:
    """Return the token that implies all the others; None if all are None.

    Only the form of a signature is checked. The router that gets the token verifies it.

    tokens: texts or None.

    Raises ConfigurationError for a malformed token, or for tokens of two clusters.
    """
    texts: dict[Token, str] = {}
    for text in tokens:
        if text is None:
            continue
        if not isinstance(text, str):
            raise ConfigurationError("these tokens cannot be merged: give each as an argument of its own, a text or None")
        try:
            texts[Token.parse(strip_signature(text) or text)] = text
        except ValueError as error:
            raise ConfigurationError(f"these tokens cannot be merged: {error}") from None
    if not texts:
        return None
    try:
        return texts[strongest([*texts])]
    except ValueError as error:
        raise ConfigurationError(f"these tokens cannot be merged: {error}") from None
