"""docs/configuration.md is what its script writes, and every field has a sentence that tells a newcomer enough."""

from __future__ import annotations

import pytest

from docs import configuration_page
from dqt_dist.config.schema import Config, DataSource, Section
from tests.config.files import ROOT

SECTIONS = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
} | {"a source": DataSource}
FIELDS = [(section, name) for section, model in SECTIONS.items() for name in model.model_fields]


def test_the_page_is_made_from_the_schema() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page.page(), "docs/configuration_page.py writes docs/configuration.md anew"
    assert all(f"- `{name}`: " in page for _, name in FIELDS) and len(FIELDS) > 80
    assert max(map(len, page.splitlines())) <= configuration_page.WIDTH


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=str)
def test_every_field_has_a_sentence(section: str, name: str) -> None:
    """Not only a few words; and where the default is no constant, the sentence says what it is."""
    field = SECTIONS[section].model_fields[name]
    assert field.description and field.description.endswith(".") and len(field.description.split()) >= 3
    if configuration_page.default_of(field) == configuration_page.ELSEWHERE:
        assert "Default" in field.description
