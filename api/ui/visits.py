"""Who looks at a page: the browser's cookie becomes a caller here, and nowhere else. Forms prove that they are ours."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute

from api import errors
from api.deps import Door, DoorDep
from api.ui import pages_above, rendering
from api.ui.filled import Filled
from shared.errors import Forbidden, Invalid, NotFound, TooLarge, TunepoolError, Unauthenticated, Unavailable
from shared.settings import Settings
from shared.tenants import sign_ins
from shared.tenants.sign_ins import SignedIn

COOKIE: Final = "tunepool_page"
SIGN_IN: Final = "/ui/sign-in"
FORM_BYTES: Final = 1024 * 1024
FORM_FIELDS: Final = 400
HOP: Final = "came-from-elsewhere"


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except Unauthenticated as error:
                return _signed_out(request, error)
            except TunepoolError as error:
                return await _refused(request, error)
            except RequestValidationError as error:
                return await _refused(request, _invalid(error))
            except errors.DATABASE_AWAY:
                away = "The service's database does not answer at the moment. Try again shortly."
                return _error_page(request, Unavailable(away, code="database_unavailable"))

        return handled


def _invalid(error: RequestValidationError) -> Invalid:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return Invalid(f"Invalid value for '{name[:100]}': {first['msg'][:200]}.", param=name[:100])


def _signed_out(request: Request, error: Unauthenticated) -> Response:
    """To the sign-in, and back afterwards. A program of the page is only told."""
    if request.headers.get("hx-request") or "text/event-stream" in request.headers.get("accept", ""):
        return Response(error.message, status_code=401, media_type="text/plain")
    if request.method != "GET":
        return _error_page(request, error)
    # A link from elsewhere comes without the cookie, which is strict. The same address asked by ourselves has it.
    if request.headers.get("sec-fetch-site") == "cross-site" and HOP not in request.query_params:
        return rendering.hop(request, str(request.url.include_query_params(**{HOP: "1"})))
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{SIGN_IN}?to={quote(here, safe='')}", status_code=303)


async def _refused(request: Request, error: TunepoolError) -> Response:
    """The page on which the refused form stands, as it was filled in; else a page of the error alone."""
    form: SubmittedForm | None = getattr(request.state, "form", None) or _filters(request, error)
    if form is None:
        return _error_page(request, error)
    request.state.form = None  # troubles of the page itself are no longer the form's
    request.state.filled = form.filled(request, error)
    shown = await pages_above.shown(request, form.page or request.scope["path"])
    if shown is None:
        request.state.filled = Filled()
        return _error_page(request, error)
    return _with_status_of(shown, errors.answer(error))


def _filters(request: Request, error: TunepoolError) -> SubmittedForm | None:
    """The form of filters that a page's address was made by; None: the error is about none of its fields."""
    if request.method != "GET" or error.param is None or error.param not in request.query_params:
        return None
    return SubmittedForm({name: request.query_params.getlist(name) for name in request.query_params})


def _error_page(request: Request, error: TunepoolError) -> Response:
    answer = errors.answer(error)
    visit = getattr(request.state, "visit", None)
    return _with_status_of(rendering.error_page(request, visit, error, status=answer.status_code), answer)


def _with_status_of(page: Response, answer: Response) -> Response:
    page.status_code = answer.status_code
    if "retry-after" in answer.headers:
        page.headers["retry-after"] = answer.headers["retry-after"]
    return page


def must_come_from_here(request: Request) -> None:
    """Raises Forbidden for a form that the browser says another site has sent."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    # Our own forms say `null`: the policy of pages that tell no referrer asks for it.
    origin = request.headers.get("origin", "null")
    same_host = origin == "null" or urlsplit(origin).netloc == request.headers.get("host")
    if site not in ("same-origin", "none") or not same_host:
        raise Forbidden("This form was sent by another site; it is not accepted.", code="form_not_ours")


class SignedInWith:
    """A browser that is signed in with a key that has the scope: `Depends(Visits("jobs:read"))`."""

    def __init__(self, scope: str | None = None) -> None:
        self._scope = scope

    def __call__(self, request: Request, door: DoorDep) -> SignedIn:
        visit: SignedIn | None = getattr(request.state, "visit", None)
        if visit is None:  # one request counts once, however many of its parts ask who looks
            visit = resumed(request, door)
            request.state.visit = visit
            door.admission.count(request, visit.caller)
        if self._scope is not None:
            visit.caller.must(self._scope)
        return visit


def resumed(request: Request, door: Door) -> SignedIn:
    """Raises Unauthenticated."""
    token = request.cookies.get(COOKIE)
    if not token:
        raise Unauthenticated("Sign in with your API key.", code="signed_out")
    with door.session() as session:
        return sign_ins.resume(session, token, door.settings)


Visitor = Annotated[SignedIn, Depends(SignedInWith())]
JobsVisitor = Annotated[SignedIn, Depends(SignedInWith("jobs:read"))]
JobsOrderer = Annotated[SignedIn, Depends(SignedInWith("jobs:write"))]
FilesVisitor = Annotated[SignedIn, Depends(SignedInWith("files:read"))]
FilesOrderer = Annotated[SignedIn, Depends(SignedInWith("files:write"))]
ModelsVisitor = Annotated[SignedIn, Depends(SignedInWith("models:read"))]
ModelsOrderer = Annotated[SignedIn, Depends(SignedInWith("models:write"))]
Operator = Annotated[SignedIn, Depends(SignedInWith("admin"))]


class SubmittedForm:
    """The fields of a form of ours. Empty ones count as not given. `page`: where it stands, if not above its action."""

    def __init__(self, fields: dict[str, list[str]], *, page: str | None = None) -> None:
        self._fields = fields
        self.page = page

    def get(self, name: str) -> str | None:
        values = self._fields.get(name)
        return values[0] if values else None

    def all(self, name: str) -> list[str]:
        return self._fields.get(name, [])

    def filled(self, request: Request, error: TunepoolError | None = None) -> Filled:
        """The form as its page shows it again."""
        fields = {name: values for name, values in self._fields.items() if name != "proof"}
        return Filled(request.scope["path"], fields, error)

    def must(self, name: str) -> str:
        value = self.get(name)
        if value is None:
            raise Invalid(f"Fill in '{name}'.", param=name, code="missing_required_parameter")
        return value

    def number(self, name: str) -> int | float | None:
        value = self.get(name)
        if value is None:
            return None
        try:
            number = float(value.replace(",", "."))
        except ValueError:
            raise Invalid(f"'{name}' must be a number, not '{value[:50]}'.", param=name) from None
        return int(number) if number.is_integer() and "." not in value and "e" not in value.lower() else number


async def read_form(request: Request) -> SubmittedForm:
    """A urlencoded form, bounded. Raises Forbidden, Invalid, TooLarge."""
    must_come_from_here(request)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Invalid("Send the page's own form.", param="Content-Type", code="unsupported_media_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_BYTES:
            raise TooLarge(f"The form is larger than {FORM_BYTES} bytes.", code="request_too_large")
    try:
        pairs = parse_qsl(body.decode("utf-8"), keep_blank_values=False, max_num_fields=FORM_FIELDS, errors="strict")
    except ValueError:
        raise Invalid("The form is not understood; load the page again.", code="invalid_form") from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return SubmittedForm(fields)


async def proven_form(
    request: Request, form: Annotated[SubmittedForm, Depends(read_form)], visit: Visitor
) -> SubmittedForm:
    """A form that this sign-in's own page has sent. Raises Forbidden."""
    visit.must_prove(form.get("proof") or "")
    request.state.form = form
    return form


ProvenForm = Annotated[SubmittedForm, Depends(proven_form)]


def set_cookie(response: Response, token: str, *, settings: Settings, secure: bool) -> None:
    response.set_cookie(
        COOKIE,
        token,
        max_age=settings.page_sign_in_seconds,
        path="/ui",
        httponly=True,
        samesite="strict",
        secure=secure,
    )


def is_secure(request: Request, settings: Settings) -> bool:
    return request.url.scheme == "https" or settings.public_url.startswith("https://")


def back(path: str) -> RedirectResponse:
    """After a form: the page that shows what it did, so that a reload does not do it again."""
    return RedirectResponse(path, status_code=303)


def address(above: str, name: str) -> str:
    """The page of something that a user has named."""
    return f"{above}/{quote(name, safe='')}"


def no_such_page(path: str) -> NotFound:
    return NotFound(f"There is no page '{path[:200]}'.")
