"""Sliding-window attention with global tokens against `naive.longformer`: outputs and gradients."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, LongformerConfig, LongformerModel
from transformers.models.bert.modeling_bert import BertSelfAttention

from realm.attention import naive, windowed
from realm.attention.binding import bind_attention
from realm.attention.longformer import LongformerAttention, LongformerSelfAttention
from realm.errors import UserError

HEADS, WIDTH = 2, 6


@pytest.fixture(scope="module", params=["blockwise (CPU)", "fused (GPU)"], autouse=True)
def implementation(request):
    """Both implementations of windowed attention, with block sizes that give texts of a few tokens
    several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fused (GPU)":
            patch.setattr(windowed, "windowed_attention", windowed._fused_windowed_attention)
        for name, value in (("_MIN_BLOCK", 3), ("_MAX_BLOCK", 5), ("CACHED_SCORES", 120)):
            patch.setattr(windowed, name, value)
        yield


def attention(window: int, dropout: float = 0.0, dilation: tuple[int, ...] = ()) -> LongformerSelfAttention:
    """A module in float64 with global projections different from the local ones."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, attention_probs_dropout_prob=dropout)
    module = LongformerSelfAttention(BertSelfAttention(config), window, dilation).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return module


def naive_rows(
    module: LongformerSelfAttention, hidden_BLW: Tensor, token_mask_BL: Tensor, global_mask_BL: Tensor
) -> Tensor:
    """`naive.longformer` for every row and head, (B, L, W); zero on padding."""
    B, L, width = hidden_BLW.shape
    rows = []
    for b in range(B):
        hidden_LW, is_global_L = hidden_BLW[b, token_mask_BL[b]], global_mask_BL[b, token_mask_BL[b]].tolist()
        local_qkv = [projection(hidden_LW) for projection in (module.query, module.key, module.value)]
        global_projections = (module.query_global, module.key_global, module.value_global)
        global_qkv = [projection(hidden_LW) for projection in global_projections]
        heads = []
        for h, dilation in enumerate(module.dilation):
            part = slice(h * width // HEADS, (h + 1) * width // HEADS)
            qkvs = [tuple(x[:, part] for x in qkv) for qkv in (local_qkv, global_qkv)]
            heads.append(naive.longformer(*qkvs, is_global_L, module.window, dilation))
        rows.append(torch.nn.functional.pad(torch.cat(heads, 1), (0, 0, 0, L - len(hidden_LW))))
    return torch.stack(rows)


def inputs(lengths: list[int], padding: int, num_global: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, token mask and global mask: up to `num_global` global tokens per row at random
    positions, fewer in later rows."""
    generator = torch.Generator().manual_seed(seed)
    L = max(lengths) + padding
    hidden_BLW = torch.randn(len(lengths), L, WIDTH, generator=generator, dtype=torch.float64)
    token_mask_BL = torch.arange(L) < torch.tensor(lengths)[:, None]
    global_mask_BL = torch.zeros_like(token_mask_BL)
    for b, length in enumerate(lengths):
        global_mask_BL[b, torch.randperm(length, generator=generator)[: max(0, num_global - b)]] = True
    return hidden_BLW, token_mask_BL, global_mask_BL


def outputs_and_gradients(
    function, module, hidden_BLW, token_mask_BL, global_mask_BL
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs on real tokens, and the gradients of a random linear combination of them with respect
    to the input and all parameters."""
    module.zero_grad()
    hidden_BLW = hidden_BLW.clone().requires_grad_()
    out = function(hidden_BLW, token_mask_BL, global_mask_BL)[token_mask_BL]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * weight).sum().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }
    return out, gradients | {"hidden": hidden_BLW.grad}


@given(
    lengths=st.lists(st.integers(1, 21), min_size=1, max_size=3),
    window=st.integers(1, 9),
    padding=st.integers(0, 5),
    num_global=st.integers(0, 4),
    dilation=st.sampled_from([(), (1, 2), (3, 3), (5, 1)]),
    seed=st.integers(0, 1000),
)
@example(lengths=[17, 5], window=4, padding=3, num_global=1, dilation=(), seed=0)
@example(lengths=[16, 16], window=4, padding=0, num_global=3, dilation=(1, 2), seed=0)
@example(lengths=[9, 1], window=2, padding=2, num_global=0, dilation=(2, 4), seed=0)
@settings(max_examples=30, deadline=None)
def test_outputs_and_gradients_equal_the_naive_reference(lengths, window, padding, num_global, dilation, seed):
    module = attention(window, dilation=dilation)
    hidden_BLW, token_mask_BL, global_mask_BL = inputs(lengths, padding, num_global, seed)
    out, gradients = outputs_and_gradients(
        lambda hidden, mask, global_mask: module(hidden, attention_mask=mask.long(), global_mask=global_mask)[0],
        module,
        hidden_BLW,
        token_mask_BL,
        global_mask_BL,
    )
    expected, expected_gradients = outputs_and_gradients(
        lambda *args: naive_rows(module, *args), module, hidden_BLW, token_mask_BL, global_mask_BL
    )
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_bf16_outputs_and_gradients_are_close():
    module = attention(4)
    hidden_BLW, token_mask_BL, global_mask_BL = inputs([30, 17], 3, 2, 2)
    exact, exact_gradients = outputs_and_gradients(
        lambda *args: module(*args)[0], module, hidden_BLW, token_mask_BL, global_mask_BL
    )

    def autocast_bf16(hidden, mask, global_mask):
        with torch.autocast("cpu", torch.bfloat16):
            return module.float()(hidden.float(), mask, global_mask)[0].double()

    out, gradients = outputs_and_gradients(autocast_bf16, module, hidden_BLW, token_mask_BL, global_mask_BL)
    torch.testing.assert_close(out, exact, atol=0.05, rtol=0.05)
    for name, gradient in exact_gradients.items():
        assert (gradients[name] - gradient).norm() < 0.06 * max(2.0, gradient.norm().item()), name


def test_global_projections_are_used_and_initialized_as_copies():
    module = attention(2)
    hidden_BLW, token_mask_BL, global_mask_BL = inputs([12], 0, 1, 0)
    _, gradients = outputs_and_gradients(
        lambda *args: module(*args)[0], module, hidden_BLW, token_mask_BL, global_mask_BL
    )
    assert all(gradients[f"{name}_global.weight"].abs().max() > 1e-3 for name in ("query", "key", "value"))
    local = BertSelfAttention(BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS))
    fresh = LongformerSelfAttention(local, 2)
    for name in ("query", "key", "value"):
        ours, copy = getattr(fresh, name).weight, getattr(fresh, f"{name}_global").weight
        assert ours is getattr(local, name).weight and ours is not copy and torch.equal(ours, copy)


@pytest.mark.parametrize("extra", [1, 3, 4, 11])
def test_padding_columns_do_not_change_outputs(extra):
    module = attention(4)
    hidden_BLW, token_mask_BL, global_mask_BL = inputs([14, 6], 0, 2, 5)
    short = module(hidden_BLW, token_mask_BL, global_mask_BL)[0]
    columns = 100 * torch.randn(2, extra, WIDTH, dtype=torch.float64)
    none = torch.zeros(2, extra, dtype=torch.bool)
    wide = module(
        torch.cat([hidden_BLW, columns], 1), torch.cat([token_mask_BL, none], 1), torch.cat([global_mask_BL, none], 1)
    )[0]
    torch.testing.assert_close(wide[:, :14][token_mask_BL], short[token_mask_BL], atol=1e-12, rtol=0)
    assert wide.isfinite().all()
    # Neither does a global mask that is true on padding.
    marked = module(
        torch.cat([hidden_BLW, columns], 1), torch.cat([token_mask_BL, none], 1), torch.cat([global_mask_BL, ~none], 1)
    )[0]
    torch.testing.assert_close(marked[:, :14][token_mask_BL], short[token_mask_BL], atol=1e-12, rtol=0)


def test_rows_without_global_tokens_attend_only_to_their_window():
    module = attention(3)
    hidden_BLW, token_mask_BL, _ = inputs([12, 12], 0, 0, 1)
    global_mask_BL = torch.zeros_like(token_mask_BL)
    global_mask_BL[0, 0] = True
    far = hidden_BLW.clone()
    far[:, 0] += 1.0
    change_BL = (
        (module(far, token_mask_BL, global_mask_BL)[0] - module(hidden_BLW, token_mask_BL, global_mask_BL)[0])
        .abs()
        .amax(-1)
    )
    assert (change_BL[0] > 1e-9).all(), "all tokens attend to a global token"
    assert (change_BL[1, :4] > 1e-9).all() and not change_BL[1, 4:].any()


def test_without_a_global_mask_the_first_token_is_global():
    module = attention(2)
    hidden_BLW, token_mask_BL, _ = inputs([11, 7], 0, 0, 2)
    first_BL = torch.zeros_like(token_mask_BL)
    first_BL[:, 0] = True
    torch.testing.assert_close(
        module(hidden_BLW, token_mask_BL)[0], module(hidden_BLW, token_mask_BL, first_BL)[0], atol=0, rtol=0
    )
    torch.testing.assert_close(
        module(hidden_BLW)[0], module(hidden_BLW, torch.ones_like(token_mask_BL), first_BL)[0], atol=0, rtol=0
    )


def test_dropout_is_applied_only_in_training():
    module = attention(2, dropout=0.5)
    hidden_BLW, token_mask_BL, global_mask_BL = inputs([9], 0, 1, 3)
    assert not torch.equal(
        module.train()(hidden_BLW, token_mask_BL, global_mask_BL)[0],
        module(hidden_BLW, token_mask_BL, global_mask_BL)[0],
    )
    assert torch.equal(
        module.eval()(hidden_BLW, token_mask_BL, global_mask_BL)[0],
        module(hidden_BLW, token_mask_BL, global_mask_BL)[0],
    )


def test_saved_tensors_are_linear_in_the_length():
    """Twice the length saves twice as many elements for the backward pass."""
    module = attention(8)

    def saved_elements(length: int) -> int:
        sizes = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        hidden_BLW, token_mask_BL, global_mask_BL = inputs([length], 0, 2, 0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(hidden_BLW, token_mask_BL, global_mask_BL)
        return sum(sizes)

    assert saved_elements(1024) < 2.1 * saved_elements(512)


def test_windows_by_layer_and_dilation_by_head_come_from_the_config():
    bert_config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
    layers = [BertSelfAttention(bert_config) for _ in range(3)]
    modules = LongformerAttention(layer_windows=(4, 8, 16), dilation=(1, 3)).replace_all(layers)
    assert [module.window for module in modules] == [4, 8, 16] and all(module.dilation == (1, 3) for module in modules)
    assert [module.window for module in LongformerAttention(window=5).replace_all(layers)] == [5, 5, 5]
    for config, message in (
        (LongformerAttention(layer_windows=(4, 8)), "layer_windows has 2 values for an encoder of 3 layers"),
        (LongformerAttention(dilation=(1, 2, 3)), "dilation has 3 values for an encoder of 2 heads"),
    ):
        with pytest.raises(UserError, match=message):
            config.replace_all(layers)
    for fields in ({"window": 0}, {"layer_windows": (4, 0)}, {"dilation": (0, 1)}):
        with pytest.raises(UserError, match="at least 1"):
            LongformerAttention(**fields)


def test_the_model_equals_transformers_longformer():
    """A BERT with this attention and the weights of a `LongformerModel`: the same hidden states."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
        "type_vocab_size": 1,
    }
    theirs = LongformerModel(
        LongformerConfig(
            **sizes, attention_window=[8, 12], max_position_embeddings=66, pad_token_id=1, initializer_range=0.4
        )
    ).eval()
    bert = BertModel(
        BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.4), add_pooling_layer=False
    ).eval()
    bind_attention(bert, LongformerAttention(layer_windows=(4, 6)))
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("pooler.")}
    # Longformer's positions start after that of the padding token.
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][2:]
    missing, unexpected = bert.load_state_dict(state, strict=False)
    assert not missing and all("position_ids" in name for name in unexpected)
    ids = torch.randint(2, 40, (2, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 29:], mask[1, 29:] = 1, 0
    global_mask = torch.zeros_like(ids)
    global_mask[:, 0] = global_mask[0, 7] = 1
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, global_attention_mask=global_mask).last_hidden_state
        found = bert(input_ids=ids, attention_mask=mask, global_mask=global_mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)
