"""What the README files promise: links that lead somewhere, examples and keys that work."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import espalier
from pipeline.recipe import FinetuneSection, Recipe, SparsifySection, TrainingSection

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in (".", "hardware", "pipeline", "benchmarks", "profiles")
    for path in (ROOT / folder).glob("README.md" if folder == "." else "**/README.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        leads = target.exists() and (not anchor or anchor in anchors(target))
        broken += [] if leads else [link]

    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_use_public_names_only(page):
    hidden = []
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "espalier":
                hidden += [a.name for a in node.names if a.name not in espalier.__all__]
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [getattr(node, "module", None) or node.names[0].name]
                hidden += [name for name in names if name.startswith(("hardware", "pipeline"))]

    assert not hidden


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_s_recipe_is_one(tmp_path):
    [text] = blocks(ROOT / "README.md", "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    assert espalier.read_recipe(path).target.latency_ratio == 0.6


def test_every_key_of_a_recipe_is_explained_with_its_default():
    text = (ROOT / "pipeline" / "README.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_.*]+)` \|(.*?)\|.+\|$", text, re.MULTILINE)
    explained = {}
    for key, default in rows:
        values = re.findall(r"`(.*?)`", default)
        if not key.startswith("*."):
            explained[key] = values
            continue
        for section, value in (("finetune", values[0]), ("sparsify", values[-1])):
            explained[key.replace("*", section)] = [value]

    assert explained.keys() == keys_of(Recipe).keys()
    for key, default in keys_of(Recipe).items():
        assert [yaml.safe_load(value) for value in explained[key]] == default, key


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, list[object]]:
    """Every key below a section with its default in a list, empty where there is none."""
    found: dict[str, list[object]] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= keys_of(kind, f"{prefix}{name}.")
        elif field.is_required():
            found[prefix + name] = []
        else:
            default = field.default
            as_json = str(default) if isinstance(default, Path) else default
            found[prefix + name] = [list(default) if isinstance(default, tuple) else as_json]
    return found


def test_keys_of_both_trainings_are_explained_once():
    shared = TrainingSection.model_fields.keys()

    assert shared <= FinetuneSection.model_fields.keys() & SparsifySection.model_fields.keys()
