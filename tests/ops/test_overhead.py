"""Eager calls start below the dispatcher's Autograd key, where the rules of torch.library take 3 us and more; whatever
transforms, traces or observes a call sees the same operators as there. No test measures time."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import segattn_ops
from segattn_ops import _backend

CALLS = {
    "position_attention": lambda f, x: f.position_attention(x, x, x, 0.5, False, None)[0],
    "position_attention_partial": lambda f, x: f.position_attention_partial(x, x, x, 0.5, None)[0],
    "channel_attention": lambda f, x: f.channel_attention(x, x, x, 0.5)[0],
    "channel_self_attention": lambda f, x: f.channel_self_attention(x, 0.5, None)[0],
    "channel_energy": lambda f, x: f.channel_energy(x, None),
    "channel_apply": lambda f, x: f.channel_apply(x[:, :, 0, :1] * x[:, :, 0, :1].mT, x, 0.5, None)[0],
    "criss_cross_affinity": lambda f, x: f.criss_cross_affinity(x, x),
    "criss_cross_aggregation": lambda f, x: f.criss_cross_aggregation(torch.cat([x, x], 1)[:, :5], x),
    "criss_cross_attention": lambda f, x: f.criss_cross_attention(x, x, x, 0.5)[0],
    "criss_cross_rows": lambda f, x: f.criss_cross_rows(x, x, x, 0.5)[0],
    "criss_cross_columns": lambda f, x: f.criss_cross_columns(x, x, x, 0.5)[0],
}
PUBLIC = {
    "position_attention": lambda x: segattn_ops.position_attention(x, x, x),
    "channel_attention": lambda x: segattn_ops.channel_attention(x, x.clone(), x),
    "channel_self_attention": lambda x: segattn_ops.residual_channel_attention(x, 0.5),
    "criss_cross_affinity": lambda x: segattn_ops.criss_cross_affinity(x, x),
    "criss_cross_aggregation": lambda x: segattn_ops.criss_cross_aggregation(torch.cat([x, x], 1)[:, :5], x),
    "criss_cross_attention": lambda x: segattn_ops.criss_cross_attention(x, x, x),
}


def draw(requires_grad=False):
    return torch.randn(2, 4, 3, 3).requires_grad_(requires_grad)


class Seen(TorchDispatchMode):
    """The operators of segattn that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.namespace == "segattn":
            self.names.append(operator._opname)
        return operator(*arguments, **(keywords or {}))


def served_directly(x):
    return _backend.operators("position_attention", x, x, x) is _backend.DIRECT["segattn"]


def test_every_operator_has_a_direct_call():
    names = {operator.name for operator in segattn_ops.ops.OPERATORS}
    assert names == set(CALLS)
    assert set(vars(_backend.DIRECT["segattn"])) == names | {f"{name}_backward" for name in names}


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_operator(name):
    x = draw(requires_grad=True)
    direct, operator = CALLS[name](_backend.DIRECT["segattn"], x), CALLS[name](torch.ops.segattn, x)
    assert torch.equal(direct, operator)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (direct, operator)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert not CALLS[name](_backend.DIRECT["segattn"], x).requires_grad
    assert not CALLS[name](_backend.DIRECT["segattn"], x.detach()).requires_grad


@pytest.mark.parametrize("name", PUBLIC)
def test_dispatch_modes_see_forward_and_backward(name):
    x = draw(requires_grad=True)
    with Seen() as seen:
        PUBLIC[name](x.detach())
        PUBLIC[name](x).sum().backward()
    assert seen.names == [name, name, f"{name}_backward"]


def test_flop_counter():
    x = draw(requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        segattn_ops.position_attention(x.detach(), x.detach(), x.detach())
    with FlopCounterMode(display=False) as both:
        segattn_ops.position_attention(x, x, x).sum().backward()
    products = 2 * 2 * 9 * 9 * 4
    assert forward.get_total_flops() == 2 * products
    assert both.get_total_flops() == 7 * products


def test_fake_tensors_and_tensor_subclasses():
    with FakeTensorMode() as mode:
        x = mode.from_tensor(draw(requires_grad=True))
        assert served_directly(x)
        y = segattn_ops.position_attention(x, x, x)
        assert type(y) is type(x) and y.requires_grad

    class Tagged(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl
        names = []

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
            )

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, operator, types, arguments=(), keywords=None):
            cls.names.append(operator._opname)
            unwrapped = [a.inner if isinstance(a, cls) else a for a in arguments]
            results = operator(*unwrapped, **(keywords or {}))
            return cls(results) if isinstance(results, torch.Tensor) else tuple(map(cls, results))

    for requires_grad in (False, True):
        x = Tagged(draw(requires_grad))
        y = segattn_ops.position_attention(x, x, x)
        assert type(y) is Tagged and y.requires_grad == requires_grad
    assert Tagged.names.count("position_attention") == 2


def test_saved_tensor_hooks_and_inference_mode():
    x = draw(requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        y = segattn_ops.position_attention(x, x, x)
    assert len(packed) == 6  # query, key, value, output, logsumexp, logsumexp_low
    y.sum().backward()
    with torch.inference_mode():
        assert segattn_ops.position_attention(x, x, x).is_inference()


def test_a_result_changed_in_place_is_noticed():
    x = draw(requires_grad=True)
    y = segattn_ops.position_attention(x, x, x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_transforms_and_forward_mode_take_the_operators_rules():
    x = draw()
    seen = []
    torch.func.vmap(lambda t: seen.append(served_directly(t)) or segattn_ops.channel_attention(t, t, t))(x[None])
    with forward_ad.dual_level():
        seen.append(served_directly(x))
    assert seen == [False, False]
    assert served_directly(x)


def test_a_batched_backward_pass():
    """torch.autograd.grad maps the backward pass over the gradients of the result."""
    x = draw(requires_grad=True)
    y = segattn_ops.position_attention(x, x, x)
    grads = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for gradient, g in zip(batched, grads, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, x, g, retain_graph=True)[0])


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")  # of a function without boxed arguments
def test_graphs_contain_the_operators():
    """jit.trace, make_fx and AOTAutograd called directly record operators, no Python function."""
    from torch._functorch.aot_autograd import aot_function

    def attend(t):
        return segattn_ops.position_attention(t, t, t).square().sum()

    x = draw(requires_grad=True)
    trace = torch.jit.trace(attend, x, check_trace=False)
    assert "segattn::position_attention" in str(trace.graph) and "PythonOp" not in str(trace.graph)
    for pre_dispatch in (False, True):
        graph = make_fx(attend, pre_dispatch=pre_dispatch)(x)
        assert any("segattn.position_attention.default" in str(node.target) for node in graph.graph.nodes)
    graphs = []

    def compiler(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    aot_function(attend, compiler, compiler)(x).backward()
    assert "segattn.position_attention.default" in graphs[0]
    assert "segattn.position_attention_backward.default" in graphs[1]
    leaf = x.detach().requires_grad_()
    attend(leaf).backward()
    torch.testing.assert_close(x.grad, leaf.grad)


def test_threads_and_graph_tasks():
    """A backward pass in another thread than its forward pass."""
    x = draw(requires_grad=True)
    y = segattn_ops.criss_cross_attention(x, x, x)
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    (expected,) = torch.autograd.grad(segattn_ops.criss_cross_attention(x, x, x).sum(), x)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_autograd(name):
    x = draw(requires_grad=True)
    (expected,) = torch.autograd.grad(PUBLIC[name](x).sin().sum(), x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = PUBLIC[name](x).sin().sum()
        torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", PUBLIC)
def test_functionalize_takes_the_operators(name):
    x = draw()
    torch.testing.assert_close(torch.func.functionalize(PUBLIC[name])(x), PUBLIC[name](x))
    graph = make_fx(torch.func.functionalize(PUBLIC[name]))(x)
    assert any(f"segattn.{name}" in str(node.target) for node in graph.graph.nodes)


def test_a_function_compiled_in_forward_mode_is_compiled_again_outside():
    torch._dynamo.reset()
    operators = []

    def backend(graph, inputs):
        operators.append(sum("segattn" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    x = draw()
    compiled = torch.compile(PUBLIC["position_attention"], fullgraph=True, backend=backend)
    with forward_ad.dual_level():
        compiled(x)
        tangents = [
            forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent
            for function in (compiled, PUBLIC["position_attention"])
        ]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(compiled(x), PUBLIC["position_attention"](x))
    assert operators == [0, 1]
