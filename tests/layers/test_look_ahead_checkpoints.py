"""Checkpoints of the original's language model, which hold the tied weight once or twice."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from lmn_kernels import LookAheadLanguageModel
from tests.support.variants import enlarged


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("attn_type", [3, 0])
def test_a_checkpoint_of_the_original_loads_strictly(attn_type, assign):
    """With its constants, its table of frequencies, the tied weight once or twice, type 0's projections packed."""
    build = partial(LookAheadLanguageModel, 11, 8, 2, 2, memory_length=6, attn_type=attn_type)
    source, model, other = (enlarged(build()) for _ in range(3))
    kept = {name: value.clone() for name, value in source.state_dict().items()} | {"pos_emb.inv_freq": torch.zeros(4)}
    kept |= {"crit.out_layers.0.weight": kept["word_emb.emb_layers.0.weight"].clone()} if assign else {}
    for n in range(2):
        prefix = f"layers.{n}.dec_attn."
        kept |= {f"{prefix}{mode}_logits_constant": torch.ones(1) for mode in ("train", "eval")}
        if attn_type == 0:
            kept[f"{prefix}qkv_net.weight"] = torch.cat([kept.pop(f"{prefix}{n}_net.weight") for n in ("q", "kv")])
    names, ids = list(kept), torch.randint(0, 11, (2, 5))
    model.load_state_dict(kept, strict=True, assign=assign)
    other.load_state_dict(model.state_dict(), assign=assign)
    assert list(kept) == names, "the caller's dictionary was changed"
    for loaded in (model, other, copy.deepcopy(model)):
        assert torch.equal(loaded(ids)[0], source(ids)[0])
        assert [parameter.shape for parameter in loaded.parameters()].count((11, 8)) == 1
    projection = f"layers.1.dec_attn.{'qkv' if attn_type == 0 else 'kv'}_net.weight"
    for change, message in (
        ({projection: kept[projection][1:]}, "size mismatch for layers.1.dec_attn"),
        ({"layers.0.dec_attn.more": torch.zeros(1)}, "Unexpected key.*layers.0.dec_attn.more"),
        ({"crit.out_layers.0.weight": torch.zeros(11, 8)}, "crit.out_layers.0.weight: expected the weights of"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"(?s){message}"):
            model.load_state_dict(kept | change, strict=True)


TABLE, COPY = "word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t.to("meta")], ids=["dtype", "meta"])
def test_a_second_copy_of_the_tied_weight_may_be_of_another_dtype_or_without_values(change):
    model = enlarged(LookAheadLanguageModel(11, 8, 1, 2, memory_length=6))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = LookAheadLanguageModel(11, 8, 1, 2, memory_length=6)
    fresh.load_state_dict(kept | {COPY: change(kept[TABLE])}, strict=True)
    assert torch.equal(fresh.state_dict()[TABLE], kept[TABLE])


def test_two_copies_of_the_tied_weight_may_hold_the_same_nan():
    model = LookAheadLanguageModel(11, 8, 1, 2, memory_length=6)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    kept[TABLE][3, 2] = torch.nan
    model.load_state_dict(kept | {COPY: kept[TABLE].clone()}, strict=True)
    assert model.state_dict()[TABLE].isnan().sum() == 1
    with pytest.raises(ValueError, match=COPY):
        model.load_state_dict(kept | {COPY: kept[TABLE].nan_to_num()}, strict=True)


def test_a_second_copy_of_another_shape_is_refused_without_values_too():
    model = LookAheadLanguageModel(11, 8, 1, 2, memory_length=6)
    with pytest.raises(ValueError, match=COPY):
        model.load_state_dict(model.state_dict() | {COPY: torch.empty(12, 8, device="meta")}, strict=True)
