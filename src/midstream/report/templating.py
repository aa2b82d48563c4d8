"""Templates with everything escaped, and a policy that lets a page load nothing."""

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from midstream import __version__
from midstream.quantities import counted
from midstream.report.words import (
    KIND_NAMES,
    SCORE_NAMES,
    duration,
    engineering,
    place,
    points,
    signed,
)


def render(template: str, **values: object) -> str:
    """A template of `templates/` as a whole page; its style sheet is inside and named by hash."""
    style = _read("style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = {"css": style, "css_hash": digest, "version": __version__}
    return _environment().get_template(template).render(**page, **values)


def data_uri(kind: str, data: bytes) -> str:
    """A picture inside the page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text()


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_read),
    )
    environment.globals |= {"kinds": KIND_NAMES, "heads": SCORE_NAMES}
    environment.filters |= {
        "counted": counted,
        "place": place,
        "points": points,
        "signed": signed,
        "engineering": engineering,
        "duration": duration,
        "p_value": lambda value: "< .0001" if value < 1e-4 else f"{value:.2g}",
    }
    return environment
