"""Made pages of the documentation site: the README as its first, a reference by package."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "midstream"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; a link of the README into `docs/` leads to the page beside it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for name, modules in packages().items():
        listed = "\n\n".join(f"::: {module}" for module in modules)
        page = f"# midstream.{name}\n\n{listed}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def on_config(config: Any) -> Any:
    """Put the reference at the end of the navigation."""
    config["nav"].append({"Reference": [f"reference/{name}.md" for name in packages()]})
    return config


def packages() -> dict[str, list[str]]:
    """By package of `midstream`, its modules that have public names."""
    found: dict[str, list[str]] = {}
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        modules = (
            path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
            for path in sorted(folder.rglob("*.py"))
            if not path.name.startswith("_")
        )
        found[folder.name] = list(modules)
    return found
