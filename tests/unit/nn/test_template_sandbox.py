"""A chat template out of a model folder runs no code."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.errors import SteersmanError
from steersman.nn.render import prompt_ids
from steersman.testing.models import tiny_tokenizer

ESCAPES = [
    "cycler.__init__.__globals__.os.system('touch {}')",
    "messages.__class__.__mro__[1].__subclasses__()[0]('{}')",
    "self.__init__.__globals__['__builtins__']['open']('{}', 'w')",
    "namespace.__init__.__globals__.__builtins__.__import__('os').system('touch {}')",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_of_a_model_folder_runs_no_code(escape: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    template = "{{ " + escape.format(mark) + " }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(SteersmanError) as refused:
        prompt_ids(tiny_tokenizer(chat_template=template), [{"role": "user", "content": "hello"}])
    assert "\n" not in str(refused.value)
    assert not mark.exists()
