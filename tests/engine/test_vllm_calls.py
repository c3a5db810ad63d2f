"""What we call of vLLM is what the installed version has, as its sources say."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import vllm_calls


def test_the_installed_vllm_has_all_that_is_called() -> None:
    """Parts that only a GPU reaches are included: sleep levels, the launcher of several ranks, both model runners."""
    spec = util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    found = vllm_calls.Package(Path(spec.origin).parent.parent).differences(vllm_calls.uses())
    assert found == [], "\n".join(found)
