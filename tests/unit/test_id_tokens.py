"""ID tokens: which are believed, which are not, and how little an issuer can do to us. No database."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Iterator

import pytest
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, RSAKey

from shared.errors import NotYet, Unauthenticated
from shared.settings import Settings
from shared.store.tables import OidcRuleRow
from shared.tenants import issuer_keys, outward
from shared.tenants.id_tokens import BadToken, IdTokens
from shared.tenants.issuer_keys import IssuerKeys, NoKeys, fetch_keys
from shared.tenants.oidc_rules import accepts, matches
from tests.fake_issuer import EC, RSA, STRANGE, Issuer, issuing
from tests.patience import patience

LOOPBACK = outward.networks("127.0.0.0/8")
DISCOVERY = "/.well-known/openid-configuration"
NOW = 1_900_000_000  # what the clock of `stopped` shows


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as one:
        yield one


@pytest.fixture
def tokens(issuer: Issuer) -> IdTokens:
    return IdTokens(Settings(oidc_issuers=issuer.url, oidc_networks="127.0.0.0/8"))


@pytest.fixture
def stopped(issuer: Issuer) -> IdTokens:
    """As `tokens`, with a clock that stands: no test of a moment depends on when it runs."""
    return IdTokens(Settings(oidc_issuers=issuer.url, oidc_networks="127.0.0.0/8"), now=lambda: NOW)


def segment(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_token_of_either_algorithm_is_believed_and_its_issuer_asked_once(issuer: Issuer, tokens: IdTokens) -> None:
    claims = tokens.verify(issuer.token())
    tokens.verify(issuer.token(EC, algorithm="ES256"))

    assert claims["repository"] == "octo/app"
    assert issuer.asked == [DISCOVERY, "/jwks"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": NOW - 61}, "has expired"),
        ({"exp": None}, "exp"),
        ({"exp": "tomorrow"}, "exp"),
        ({"exp": True}, "exp"),
        ({"iat": None}, "iat"),
        ({"iat": NOW + 3600}, "future"),
        ({"nbf": NOW + 3600}, "not yet valid"),
        ({"sub": None}, "sub"),
        ({"sub": ["a"]}, "sub"),
        ({"aud": None}, "aud"),
        ({"aud": [1]}, "aud"),
        ({"jti": 7}, "jti"),
        ({"iss": "https://evil.example"}, "not allowed here"),
        ({"iss": ["a"]}, "not allowed here"),
        ({"iss": None}, "not allowed here"),
    ],
)
def test_a_token_whose_claims_do_not_hold_is_refused(
    issuer: Issuer, stopped: IdTokens, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(BadToken, match=words):
        stopped.verify(issuer.token(**{"iat": NOW, "nbf": NOW, "exp": NOW + 300, **changes}))


@pytest.mark.parametrize("changes", [{"exp": NOW - 30}, {"iat": NOW + 30}, {"nbf": NOW + 30}])
def test_clocks_may_differ_by_a_minute(issuer: Issuer, stopped: IdTokens, changes: dict[str, object]) -> None:
    assert stopped.verify(issuer.token(**{"iat": NOW, "nbf": NOW, "exp": NOW + 300, **changes}))


def test_a_token_signed_by_another_key_of_the_same_id_is_refused(issuer: Issuer, tokens: IdTokens) -> None:
    with pytest.raises(BadToken, match="does not fit"):
        tokens.verify(issuer.token(STRANGE))


@pytest.mark.parametrize("name", ["none", "None", "HS256", "RS384", "PS256", "EdDSA", "", None, 7, ["RS256"]])
def test_no_other_algorithm_is_taken(issuer: Issuer, tokens: IdTokens, name: object) -> None:
    if isinstance(name, list):
        name = json.dumps(name)
    claims = segment(issuer.claims())

    with pytest.raises(BadToken, match="must be signed by ES256 or RS256"):
        tokens.verify(f"{segment({'alg': name, 'kid': 'rsa-1'})}.{claims}.AAAA")


def test_the_public_key_as_the_secret_of_an_hmac_signs_nothing(issuer: Issuer, tokens: IdTokens) -> None:
    for secret in (RSA.as_pem(private=False), json.dumps(RSA.as_dict(private=False)).encode()):
        for algorithm in ("HS256", "RS256"):
            signed = f"{segment({'alg': algorithm, 'kid': 'rsa-1'})}.{segment(issuer.claims())}"
            signature = base64.urlsafe_b64encode(hmac.digest(secret, signed.encode(), "sha256")).rstrip(b"=").decode()

            with pytest.raises(BadToken):
                tokens.verify(f"{signed}.{signature}")


def test_a_key_is_used_with_its_own_algorithm_only(issuer: Issuer, tokens: IdTokens) -> None:
    with pytest.raises(BadToken, match="does not fit"):
        tokens.verify(issuer.token(EC, algorithm="ES256", header={"kid": "rsa-1"}))


@pytest.mark.parametrize("extra", [{"crit": ["exp"]}, {"b64": False, "crit": ["b64"]}])
def test_a_header_that_asks_for_more_is_refused(issuer: Issuer, tokens: IdTokens, extra: dict[str, object]) -> None:
    _, claims, signature = issuer.token().split(".")

    with pytest.raises(BadToken):
        tokens.verify(f"{segment({'alg': 'RS256', 'kid': 'rsa-1', **extra})}.{claims}.{signature}")


def test_a_key_that_a_token_brings_along_is_not_used(issuer: Issuer, tokens: IdTokens) -> None:
    own = {"jwk": STRANGE.as_dict(private=False), "jku": "http://127.0.0.1:1/jwks"}

    with pytest.raises(BadToken):
        tokens.verify(issuer.token(STRANGE, header=own))
    assert issuer.asked == [DISCOVERY, "/jwks"]


@pytest.mark.parametrize(
    "junk",
    [
        *("", "x", "a.b", "a.b.c.d", "....", "tp_x", "ü.ü.ü", "e30.e30.", "e30.W10.AAAA", "bnVsbA.e30.AAAA"),
        *("a" * 17_000, f"{'W1tb' * 5000}.e30.AAAA", f"e30.{segment({'iss': 'x' * 17_000})}.AAAA", "e30.e30.AA\n"),
    ],
)
def test_junk_is_refused_and_nobody_is_asked(issuer: Issuer, tokens: IdTokens, junk: str) -> None:
    with pytest.raises(BadToken):
        tokens.verify(junk)
    assert issuer.asked == []


def test_nobody_is_asked_about_an_issuer_that_is_not_allowed(issuer: Issuer) -> None:
    tokens = IdTokens(Settings(oidc_networks="127.0.0.0/8"))

    assert tokens.issuers == ("https://token.actions.githubusercontent.com", "https://gitlab.com")
    with pytest.raises(BadToken, match="TUNEPOOL_OIDC_ISSUERS"):
        tokens.verify(issuer.token())
    assert issuer.asked == []


def test_an_issuer_within_our_network_is_not_asked_unless_the_operator_allows_it(issuer: Issuer) -> None:
    tokens = IdTokens(Settings(oidc_issuers=issuer.url))

    with pytest.raises(NotYet):
        tokens.verify(issuer.token())
    assert issuer.asked == []


def test_an_unknown_key_has_its_issuer_asked_once_a_minute_and_a_new_key_is_known_then(issuer: Issuer) -> None:
    now = [1000.0]
    keys = IssuerKeys([issuer.url], lambda url: fetch_keys(url, allowed=LOOPBACK), clock=lambda: now[0])
    fresh = RSAKey.generate_key(2048, {"kid": "rsa-2"})
    keys.find(issuer.url, "rsa-1")

    issuer.publish(RSA, fresh)
    for _ in range(20):
        with pytest.raises(Unauthenticated, match="does not publish"):
            keys.find(issuer.url, "rsa-2")
    assert issuer.asked == [DISCOVERY, "/jwks"]

    now[0] += issuer_keys.LOOK_SECONDS
    assert keys.find(issuer.url, "rsa-2").algorithm == "RS256"
    assert len(issuer.asked) == 4


def test_a_key_that_was_taken_back_is_not_believed_after_an_hour(issuer: Issuer) -> None:
    now = [1000.0]
    keys = IssuerKeys([issuer.url], lambda url: fetch_keys(url, allowed=LOOPBACK), clock=lambda: now[0])
    keys.find(issuer.url, "rsa-1")

    issuer.publish(EC)
    now[0] += issuer_keys.FRESH_SECONDS + 1

    with pytest.raises(Unauthenticated, match="does not publish"):
        keys.find(issuer.url, "rsa-1")


def test_the_keys_of_an_issuer_that_is_away_are_believed_for_six_hours() -> None:
    now, away = [1000.0], [False]
    fetched: list[float] = []

    def fetch(_: str) -> issuer_keys.KeysById:
        fetched.append(now[0])
        if away[0]:
            raise NoKeys("away")
        return {"rsa-1": issuer_keys.IssuerKey(RSA, "RS256")}

    keys = IssuerKeys(["x"], fetch, clock=lambda: now[0])
    keys.find("x", "rsa-1")
    away[0] = True
    now[0] += issuer_keys.STALE_SECONDS - 1
    assert keys.find("x", "rsa-1")
    now[0] += 2
    for _ in range(5):
        with pytest.raises(NotYet):
            keys.find("x", "rsa-1")

    assert len(fetched) == 2  # the second look failed, and the next one waits a little


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        (DISCOVERY, (302, {"Location": "/elsewhere"}, b""), "answered 302"),
        (DISCOVERY, (500, {}, b""), "answered 500"),
        (DISCOVERY, (200, {}, b"not json"), "no JSON object"),
        (DISCOVERY, (200, {}, b"[" * 100_000), "no JSON object"),
        (
            DISCOVERY,
            (200, {}, b'{"issuer": "https://evil.example", "jwks_uri": "https://evil.example/"}'),
            "is that of",
        ),
        (DISCOVERY, (200, {}, b" " * (issuer_keys.MOST_BYTES + 1)), "longer than"),
        ("/jwks", (302, {"Location": "/elsewhere"}, b""), "answered 302"),
        ("/jwks", (200, {}, b'{"keys": [' + b" " * 10_000_000), "longer than"),
        ("/jwks", (200, {}, json.dumps({"keys": [{}] * 101}).encode()), "at most 100"),
        ("/jwks", (200, {}, b'{"keys": {}}'), "at most 100"),
        ("/jwks", (200, {}, b'{"keys": []}'), "no RSA or P-256 key"),
    ],
)
def test_an_issuer_that_lies_or_is_ill_gives_no_keys(
    issuer: Issuer, path: str, answer: tuple[int, dict[str, str], bytes], words: str
) -> None:
    issuer.answers[path] = answer

    with pytest.raises(NoKeys, match=words):
        fetch_keys(issuer.url, allowed=LOOPBACK, seconds=patience(5))
    assert "/elsewhere" not in issuer.asked


@pytest.mark.parametrize("address", ["http://169.254.169.254/latest", "https://10.0.0.1/jwks", "file:///etc/passwd", 7])
def test_an_issuer_leads_us_nowhere_inside(issuer: Issuer, address: object) -> None:
    issuer.answers[DISCOVERY] = (200, {}, json.dumps({"issuer": issuer.url, "jwks_uri": address}).encode())

    with pytest.raises(NoKeys):
        fetch_keys(issuer.url, allowed=LOOPBACK)


def test_an_issuer_that_answers_byte_by_byte_is_cut_off_in_time(issuer: Issuer) -> None:
    issuer.drips = True
    began = time.monotonic()

    with pytest.raises(NoKeys, match="did not answer in time"):
        fetch_keys(issuer.url, allowed=LOOPBACK, seconds=0.5)
    assert time.monotonic() - began < patience(5)


def test_keys_that_sign_no_token_of_ours_are_left_out(issuer: Issuer) -> None:
    with pytest.warns(SecurityWarning):
        weak = RSAKey.generate_key(1024, {"kid": "weak"})
    other = ECKey.generate_key("P-384", {"kid": "p384"})
    issuer.publish(RSA, EC, weak, other)
    issuer.keys += [
        {"kty": "oct", "k": "AAAA", "kid": "hmac"},
        {**RSA.as_dict(private=False), "kid": "encrypts", "use": "enc"},
        {**RSA.as_dict(private=False), "kid": "other", "alg": "RS512"},
        {**RSA.as_dict(private=False)},
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "long", "n": "A" * 100_000, "e": "AQAB"},
        {"kty": ["RSA"], "kid": "odd"},
        {"kty": "RSA", "kid": "bare"},
        {"kty": "RSA", "kid": ["list"]},
        "text",
    ]
    if "kid" in issuer.keys[7]:
        del issuer.keys[7]["kid"]

    assert set(fetch_keys(issuer.url, allowed=LOOPBACK)) == {"rsa-1", "ec-1"}


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("octo/app", "octo/app", True),
        ("octo/app", "octo/app2", False),
        ("octo/app", "Octo/app", False),
        ("octo/*", "octo/app", True),
        ("octo/*", "octo/", True),
        ("octo/*", "octo/app/more", False),
        ("octo/*", "octo-evil/app", False),
        ("refs/heads/release-*", "refs/heads/release-1.2", True),
        ("refs/heads/*", "refs/heads/a/b", False),
        ("refs/heads/**", "refs/heads/a/b", True),
        ("repo:octo/app:*", "repo:octo/app:ref:refs/heads/main", False),
        ("repo:octo/app:**", "repo:octo/app:ref:refs/heads/main", True),
        ("repo:octo/*:ref:refs/heads/main", "repo:octo/a:environment:x:ref:refs/heads/main", False),
        ("*", "", True),
        ("a*b*c", "aXbYbZc", True),
        ("a*b*c", "aXbYbZ", False),
        ("**c", "abcabc", True),
        ("a", None, False),
    ],
)
def test_a_star_stands_for_one_part_and_two_stars_for_anything(pattern: str, text: str | None, *, fits: bool) -> None:
    assert matches(pattern, text) is fits


def test_no_pattern_takes_long() -> None:
    began = time.monotonic()

    assert not matches("**a**a**a**b", "a" * 16_000)
    assert time.monotonic() - began < patience(2)


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({}, True),
        ({"aud": ["https://other.example", "https://tunepool.example.com"]}, True),
        ({"aud": "https://other.example"}, False),
        ({"iss": "https://gitlab.com"}, False),
        ({"repository": "octo/other"}, False),
        ({"repository": None}, False),
        ({"repository": ["octo/app"]}, False),
        ({"ref": "refs/heads/dev"}, False),
        ({"ref_protected": False}, False),
        ({"ref_protected": "true"}, True),
    ],
)
def test_a_rule_takes_what_fits_in_every_claim(changes: dict[str, object], *, accepted: bool) -> None:
    rule = OidcRuleRow(
        issuer="https://issuer.example",
        audience="https://tunepool.example.com",
        claims={"repository": "octo/app", "ref": "refs/heads/main", "ref_protected": "true"},
    )
    claims = Issuer("https://issuer.example").claims(**{"ref_protected": True} | changes)

    assert accepts(rule, claims) is accepted
