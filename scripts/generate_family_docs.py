"""Write docs/families.md, the list of supported families, from the tests: `python scripts/generate_family_docs.py`.

The families are those that tests/test_exact.py runs; a test there fails when the page is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from families import FAMILIES, UNSUPPORTED  # noqa: E402  # the tests' folder is no package

__all__ = ["PATH", "render"]

PATH = ROOT / "docs" / "families.md"

_HEAD = """\
# Families

<!-- Written by scripts/generate_family_docs.py. Change tests/families.py, then run it again. -->

A family of models works when transformers has it as a causal language model whose experts are made by
`use_experts_implementation` (transformers/integrations/moe.py). No family is code in moeinf; for each there is a test.
"""

_TESTED = """\
## Tested

For a tiny random checkpoint of each of these {count} model types, saved, pulled and loaded, in float32 and in bfloat16
on the CPU with `--kernels torch`, logits are equal bit for bit to those of eager experts in transformers and 32
greedy tokens are the same: with the fewest slots that can work, with a quarter of all experts, and with all of them,
while reads take random
times (tests/test_exact.py).
"""

_REFUSED = """\
## Not supported

`moeinf pull` refuses these, and says why.

| model type | because |
|---|---|
"""


def render() -> str:
    names = ", ".join(f"`{name}`" for name in sorted(FAMILIES))
    rows = "".join(f"| `{name}` | {reason} |\n" for name, reason in sorted(UNSUPPORTED.items()))
    return f"{_HEAD}\n{_TESTED.format(count=len(FAMILIES))}\n{names}\n\n{_REFUSED}{rows}"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
