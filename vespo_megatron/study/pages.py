"""Pages that are one file each and ask nothing of a network: pictures inside, no script."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A PNG with its words."""

    title: str
    caption: str
    content: bytes

    @property
    def png(self) -> str:
        """As base64."""
        return base64.b64encode(self.content).decode("ascii")


def page(template: str, **names: Any) -> str:
    """A template of `study/templates` with these names."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vespo_megatron.study"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**names)
