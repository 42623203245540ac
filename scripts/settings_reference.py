"""Write docs/reference/settings.md from src/calm/settings.py: the docstring below a field is its description.

python scripts/settings_reference.py            # write
python scripts/settings_reference.py --check    # exit 1 when the page is not current
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import msgspec

from calm import settings
from calm.records import Weights

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "settings.md"

INTRO = """\
# Settings

<!-- made by scripts/settings_reference.py from src/calm/settings.py; edit that file instead -->

Precedence, lowest first: the defaults below; the config file; environment variables; command-line flags.

The config file is TOML: `--config FILE`, `$CALM_CONFIG`, or `$XDG_CONFIG_HOME/calm/calm.toml`. Every setting
can come from the environment as `CALM_<SECTION>__<FIELD>`, e.g. `CALM_SERVER__PORT=9000`; lists are
comma-separated there. `calm config check FILE` tells what is wrong with a file, `calm config show` what is in
force and where each value comes from.

```toml
[server]
port = 9000

[memory]
budget = "6GiB"

[policy]
goal = "frugal"

[goals.frugal]
latency = 0.1
energy = 0.6
quality = 0.3
```
"""

OUTRO = """\
## [goals.NAME]

Named weights of your own, chosen by `policy.goal`, `calm goal set NAME` or a request's `calm.goal`. Fields:
{weights}; at least 0, at least one above it; only their ratios matter.

## Places

| variable | default | what lies there |
|---|---|---|
| `CALM_CONFIG` | `$XDG_CONFIG_HOME/calm/calm.toml` | the config file |
| `CALM_CACHE_DIR` | `$XDG_CACHE_HOME/calm` | weights and other fetched files |
| `CALM_STATE_DIR` | `$XDG_STATE_HOME/calm` | knowledge, API keys |
| `CALM_URL` | `http://127.0.0.1:8420` | the server that `calm ask` and the other client commands talk to |
| `CALM_API_KEY` | | the key they send |
| `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` | | honoured by `hf:` sources |
"""


def described(tree: ast.Module) -> dict[str, tuple[str, dict[str, str]]]:
    """Class name -> (docstring, field -> description)."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            fields = {}
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    fields[field.target.id] = " ".join(str(text.value.value).split())
            found[node.name] = (ast.get_docstring(node) or "", fields)
    return found


def shown(value: object) -> str:
    return "unset" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def page() -> str:
    texts = described(ast.parse(Path(settings.__file__).read_text(encoding="utf-8")))
    parts = [INTRO]
    for section, kind in settings.SECTIONS.items():
        about, fields = texts[kind.__name__]
        parts.append(f"## [{section}]\n\n{about}\n\n| setting | default | meaning |\n|---|---|---|")
        defaults = kind()
        for name in kind.__struct_fields__:
            meaning = fields[name].replace("|", "\\|")
            parts.append(f"| `{name}` | {shown(getattr(defaults, name))} | {meaning} |")
        parts.append("")
    weights = ", ".join(f"`{name}`" for name in Weights.__struct_fields__)
    parts.append(OUTRO.format(weights=weights))
    return "\n".join(parts)


def main() -> int:
    text = page()
    if "--check" in sys.argv:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
