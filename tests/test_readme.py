"""The README is true: its tables are the committed results, its commands are the ones CI runs."""

import re
from pathlib import Path

import pytest

from benchmarks import readme
from lowmem_imagic.settings.presets import GROUPS, preset

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", readme.DOCUMENTS)
def test_tables_are_the_committed_results(name):
    """Every table in a document equals the output of `benchmarks.readme` for the result files and presets."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert readme.filled(text, readme.DOCUMENTS[name]) == text


def test_the_guide_has_the_presets_of_every_group():
    """The guide's second table has a row for each group and preset whose values differ from the first table's."""
    text = (REPOSITORY / "docs/guide.md").read_text(encoding="utf-8")
    rows = []
    for group, presets in GROUPS.items():
        for name in presets:
            config = preset(name).for_group(group)
            embed, finetune, sample = config.embed, config.finetune, config.sample
            rows.append(
                f"| `{group}` | `{name}` | {embed.steps} steps, rate {embed.learning_rate:g} "
                f"| {finetune.steps} steps, rate {finetune.learning_rate:g}, rank {finetune.lora_rank} on "
                f"`{finetune.adapt}` | {sample.scheduler}, guidance {sample.guidance_scale:g} |"
            )
    assert re.findall(r"^\| `(?:large|flow|cascade)` .*$", text, re.MULTILINE) == rows and len(rows) > 6


def test_there_are_two_commands_and_ci_runs_one_of_them():
    """One command tries the tool, one tests it, each one line; CI takes the latter from the README itself."""
    commands = re.findall(r"<!-- command: (\w+) -->\n```sh\n([^\n]+)\n```", TEXT)
    assert [name for name, _ in commands] == ["try", "tests"]
    assert all(line.startswith("python3 -m venv .venv && ") for _, line in commands)
    assert "<!-- command: tests -->" in (REPOSITORY / ".ci/run").read_text(encoding="utf-8")


PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for folder in (".", "docs", "benchmarks")
    for path in (REPOSITORY / folder).glob("*.md")
)
"""All pages of the repository."""


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Every relative link and picture of a page leads to a file of the repository, and to a heading in it."""
    path = REPOSITORY / name
    for link in re.findall(r"\]\(([^):\s]+)\)", path.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if heading:
            lines = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}, link


def test_every_constraint_is_exact():
    """constraints.txt pins exact versions."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").split()
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
