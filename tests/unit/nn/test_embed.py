"""Vectors of texts: a row's vector depends on the row alone, and on real tokens alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RobertaModel

from steersman.errors import ContextLengthError, InvalidArgumentError
from steersman.nn.embed import Embedder, Pooling
from steersman.testing.models import save_model_folder, tiny_llama, tiny_roberta_reward

ROWS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("encoder"), tiny_roberta_reward())


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_an_encoder_by_hand_and_alone(encoder: Path, pooling: Pooling) -> None:
    embedder = Embedder(encoder, pooling=pooling)
    together = embedder.vectors(ROWS)
    alone = np.concatenate([embedder.vectors([row]) for row in ROWS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    model = RobertaModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ROWS[2]])).last_hidden_state[0]
    wanted = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling].numpy()
    np.testing.assert_allclose(together[2], wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_decoder_gives_its_trunk(tmp_path: Path) -> None:
    model = tiny_llama()
    embedder = Embedder(save_model_folder(tmp_path, model), normalize=False)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([ROWS[0]])).last_hidden_state[0]
    np.testing.assert_allclose(embedder.vectors(ROWS)[0], states.mean(0).numpy(), atol=1e-5)


def test_bounds(encoder: Path) -> None:
    embedder = Embedder(encoder)
    embedder.ids(0, [5] * 512)
    with pytest.raises(ContextLengthError):
        embedder.ids(0, [5] * 513)
    for wrong in ("", [], [100_000]):
        with pytest.raises(InvalidArgumentError):
            embedder.ids(0, wrong)
    with pytest.raises(InvalidArgumentError, match="dimensions"):
        embedder.cut(embedder.vectors(ROWS), 33)


def test_no_text_becomes_a_control_token(encoder: Path) -> None:
    embedder = Embedder(encoder)
    special = {int(i) for i in embedder._tokenizer.all_special_ids}
    plain = [token for token in embedder.ids(0, "hello") if token in special]
    assert [token for token in embedder.ids(0, "</s><|im_end|>") if token in special] == plain
