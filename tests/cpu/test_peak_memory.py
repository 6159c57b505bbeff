"""What is alive at once: slices of the rows of dX, and a pre-activation that is overwritten."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sonic
from sonic import ops
from sonic.reference import stages
from sonic.runtime.columns import column_slices
from sonic.runtime.errors import ArgumentError

T, H, I, E, TOP_K = 9, 24, 8, 4, 3  # noqa: E741
# (rows, H, I) of large layers.
SIZES = [
    (262144, 4096, 1024),
    (196608, 1536, 256),
    (262144, 2048, 768),
    (131072, 7168, 2048),
    (163840, 2048, 512),
    (32768, 2880, 2880),
    (8192, 8192, 128),
    (500000, 1032, 4096),
]


def make_layer(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def leaf(*size):
        return torch.randn(*size, dtype=dtype, generator=generator).requires_grad_()

    return {
        "hidden_states": leaf(T, H),
        "topk_ids": torch.randint(-1, E, (T, TOP_K), generator=generator),
        "topk_weights": leaf(T, TOP_K),
        "w1": leaf(E, 2 * I, H),
        "w2": leaf(E, H, I),
        "b1": leaf(E, 2 * I),
        "b2": leaf(E, H),
    }


def leaves_of(layer):
    return [tensor for tensor in layer.values() if tensor.requires_grad]


def gradients(layer, run=sonic.experts, **options):
    out = run(**layer)
    return torch.autograd.grad(out.sin().sum(), leaves_of(layer), **options)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# --- slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "width"), SIZES)
@pytest.mark.parametrize("per_row", [1, 2])
def test_slices_cover_all_columns_and_fill_the_gpu(rows, columns, width, per_row):
    whole, other = rows * columns * 2, rows * width * 2 * per_row
    slices = column_slices(rows, columns, 2, other)
    position = 0
    for first, count in slices:
        assert first == position and count > 0
        position += count
    assert position == columns
    widest = slices[0][1]
    assert all(count <= widest for _, count in slices)
    tile = next(tile for tile in (256, 192) if len(slices) == 1 or widest % tile == 0)
    column_of_tiles = -(-rows // 128)
    busy = column_of_tiles * -(-widest // tile)
    assert len(slices) == 1 or busy >= 8 * 132
    # Where it does not fit, half of that would be no tile, or would leave SMs idle.
    fits = other + rows * widest * 2 <= whole
    assert fits or other >= whole or busy // 2 - column_of_tiles < 8 * 132


def test_one_slice_is_enough():
    assert column_slices(1000, 4096, 2, 10**9) == ((0, 4096),)  # too few rows to cut
    assert column_slices(262144, 4096, 2, 262144 * 8192) == ((0, 4096),)  # there is no room
    assert column_slices(0, 64, 2, 0) == ((0, 64),)


def test_slices_take_the_room_beside_what_is_alive():
    rows, columns, width = SIZES[2]
    slices = column_slices(rows, columns, 2, rows * 2 * width * 2)
    assert slices == ((0, 512), (512, 512), (1024, 512), (1536, 512))


@pytest.mark.parametrize("flat", [False, True])
def test_slices_make_up_the_whole(monkeypatch, flat):
    def run(topk_ids, topk_weights, **layer):
        if not flat:
            return sonic.experts(topk_ids=topk_ids, topk_weights=topk_weights, **layer)
        tokens = torch.arange(T).repeat_interleave(TOP_K).flip(0)
        lists = tokens, topk_ids.flatten(), topk_weights.flatten()
        x, w1, w2 = (layer.pop(name) for name in ("hidden_states", "w1", "w2"))
        return sonic.experts_flat(x, *lists, w1, w2, **layer)

    layer = make_layer(torch.float64)
    expected = [run(**layer), *gradients(layer, run)]
    widths = []

    stage = stages.up_backward_act

    def recorded(*arguments, **options):
        rows = stage(*arguments, **options)
        widths.append(rows.shape[1])
        return rows

    monkeypatch.setattr(stages, "up_backward_act", recorded)
    monkeypatch.setattr(ops, "column_slices", lambda *_: ((0, 8), (8, 8), (16, 8)))
    in_slices = [run(**layer), *gradients(layer, run, retain_graph=True)]
    for actual, right in zip(in_slices, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)
    assert widths == [8] * 3


# --- the pre-activation ---------------------------------------------------------------------------


@pytest.fixture
def overwritten(monkeypatch):
    """Of each backward pass that ran, whether it wrote over the pre-activation."""
    seen = []
    stage = stages.down_backward_act

    def recorded(dout, w2, h, *arguments, overwrite_h=False, **options):
        dh, *rest = stage(dout, w2, h, *arguments, overwrite_h=overwrite_h, **options)
        assert (dh.data_ptr() == h.data_ptr()) == overwrite_h
        seen.append(overwrite_h)
        return dh, *rest

    monkeypatch.setattr(stages, "down_backward_act", recorded)
    return seen


def test_a_graph_that_is_not_kept_gives_its_preactivation_away(overwritten):
    layer = make_layer()
    kept = gradients(layer, retain_graph=True)
    given_away = gradients(layer)
    assert overwritten == [False, True]
    assert_same_bits(given_away, kept)


def test_a_kept_graph_can_run_again(overwritten):
    layer = make_layer()
    out = sonic.experts(**layer).sin().sum()
    leaves = leaves_of(layer)
    passes = [torch.autograd.grad(out, leaves, retain_graph=again) for again in (True, True, False)]
    assert overwritten == [False, False, True]
    assert_same_bits(passes[1], passes[0])
    assert_same_bits(passes[2], passes[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves)


def test_a_graph_that_was_used_up_gets_the_error_of_torch(overwritten):
    """With nothing behind the layer, whose own error would come first."""
    layer = make_layer()
    out = sonic.experts(**layer)
    out.backward(torch.ones_like(out))
    assert overwritten == [True]
    with pytest.raises(RuntimeError, match="through the graph a second time"):
        out.backward(torch.ones_like(out))


def test_a_captured_pass_overwrites_nothing(overwritten, monkeypatch):
    """Its replay reads the pre-activation again, whether or not the forward pass is replayed."""
    layer = make_layer()
    expected = gradients(layer)

    def slices(*_):
        raise AssertionError("a capture launched what the pass before it had not")

    monkeypatch.setattr(ops, "column_slices", slices)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for captures in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=captures: c)
        assert_same_bits(gradients(layer), expected)
    assert overwritten == [True, False, True]


def test_hooks_that_keep_what_is_saved_keep_it_unchanged(overwritten):
    layer, kept = make_layer(), []

    def pack(tensor):
        kept.append((tensor, tensor.clone()))
        return tensor

    expected = gradients(layer)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = sonic.experts(**layer)
    assert_same_bits(torch.autograd.grad(out.sin().sum(), leaves_of(layer)), expected)
    assert overwritten == [True, False]
    assert any(now.shape == (T * TOP_K, 2 * I) for now, _ in kept)
    assert_same_bits(*zip(*kept, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(overwritten, reentrant):
    """A reentrant checkpoint differentiates a graph of its own, which nobody keeps."""
    layer = make_layer()
    expected = gradients(layer)

    def run(hidden_states, **others):
        def layer_of(x):
            return sonic.experts(x, **others)

        return checkpoint(layer_of, hidden_states, use_reentrant=reentrant)

    out = run(**layer).sin().sum()
    out.backward()
    assert_same_bits([leaf.grad for leaf in leaves_of(layer)], expected)
    assert overwritten == [True, reentrant]


def test_whoever_called_the_operator_has_its_preactivation(overwritten):
    layer = make_layer()
    plan = sonic.build_plan(layer["topk_ids"], E)
    indices = plan.offset_by_expert, plan.token_by_row, plan.slot_by_row, plan.row_by_slot
    tensors = [layer[name] for name in ("hidden_states", "w1", "b1", "w2", "b2", "topk_weights")]
    how = "swiglu", "interleaved", "reference", True, None, None
    out, h = torch.ops.sonic.experts_forward(*tensors, *indices, None, None, TOP_K, *how)
    before = h.clone()
    out.sin().sum().backward()
    assert overwritten == [False]
    assert torch.equal(h, before)


def test_compiled_layers_overwrite_nothing(overwritten):
    layer = make_layer()
    expected = gradients(layer)
    torch._dynamo.reset()
    compiled = torch.compile(sonic.experts, backend="aot_eager", fullgraph=True)
    assert_same_bits(gradients(layer, compiled), expected)
    assert overwritten == [True, False]


def test_torch_that_does_not_say_keeps_its_graphs(overwritten, monkeypatch):
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    gradients(make_layer())
    assert overwritten == [False]


def test_a_failed_backward_pass_is_not_repeated(monkeypatch):
    layer = make_layer()
    out = sonic.experts(**layer)

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("no memory for dw2")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(stages, "down_backward_weight", fail)
        out.backward(torch.ones_like(out))
    with pytest.raises(ArgumentError, match="failed before.*Allowed: one attempt.*retain_graph"):
        out.backward(torch.ones_like(out))
