"""What an operator is, and the one place where operators are registered.

An :class:`Operator` is a definition (plain PyTorch, differentiable) with a schema. From these it
registers two ``torch.library`` ops, ``fastfusion::<name>`` and ``fastfusion::<name>_backward``,
each with a fake kernel, a vmap rule, an autocast rule (the forward op) and a FLOP formula, and
joins them by autograd. A backend is another way to compute the same two functions: a forward and
a backward callable with the arguments of the schema, and ``why_not(*args)``, which gives None or
the reason why it cannot take these arguments.

The choice of the backend happens while the op runs, not while it is traced: the strongest wish is
the argument ``backend=``, then :func:`backend` around the call, then ``FASTFUSION_BACKEND``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import (
    get_single_level_autograd_function_allowed,
    set_single_level_autograd_function_allowed,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fastfusion import native
from fastfusion.ops.choice import choose as _choice
from fastfusion.ops.flops import register_flops

log = logging.getLogger("fastfusion")

NAMESPACE = "fastfusion"
#: In the order in which "auto" tries them.
BACKENDS = ("cuda", "triton", "cpp", "reference")
CHOICES = ("auto", *BACKENDS)

OPERATORS: dict[str, Operator] = {}

_library = torch.library.Library(NAMESPACE, "DEF")
_wished: ContextVar[str | None] = ContextVar("fastfusion_backend", default=None)

_PLAIN = (Tensor, torch.nn.Parameter)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for every operator called in the block.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"``, ``"cuda"``, or ``"auto"``.

    Raises:
        TypeError, ValueError: ``name`` is not one of these.
        RuntimeError: later, by a call in the block which that backend cannot run.

    >>> import torch, fastfusion
    >>> with fastfusion.backend("reference"):
    ...     low, high = fastfusion.ops.haar_split2d(torch.ones(1, 1, 4, 4))
    """
    from fastfusion.ops import checks

    checks.choice("name", name, CHOICES)
    token = _wished.set(name)
    try:
        yield
    finally:
        _wished.reset(token)


def wished_backend(argument: str) -> str:
    """The backend asked for by the argument, the surrounding block or the environment."""
    if argument != "auto":
        return argument
    block = _wished.get()
    if block is not None:
        return block
    environment = os.environ.get("FASTFUSION_BACKEND", "auto")
    if environment not in CHOICES:
        raise ValueError(
            f"FASTFUSION_BACKEND must be one of {', '.join(CHOICES)}, got {environment!r}"
        )
    return environment


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last for an image stored so (and not contiguous as well), else contiguous."""
    if (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def image_like(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """An uninitialised tensor in the layout of ``x``, of its own or another shape."""
    return torch.empty(
        x.shape if shape is None else tuple(shape),
        dtype=x.dtype,
        device=x.device,
        memory_format=layout_of(x),
    )


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    ``why_not`` says what the backend cannot do; ``declines`` what it can, but slower than the next
    one, so that "auto" leaves it to that; ``declines_backward`` speaks of the backward pass.
    ``exact`` promises results in the layout of the fake kernels and in memory of their own; those
    of the others are brought to that.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    why_not: Callable[..., str | None]
    declines: Callable[..., str | None]
    declines_backward: Callable[..., str | None]
    exact: bool = False


def _nothing_against(*args: Any) -> None:
    return None


class Operator:
    """An operator: its definition, its schema, its backends.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``, tensors first. A trailing ``str backend`` is
            added. Tensors may be optional; lists of tensors are not allowed.
        reference: the definition, differentiable PyTorch with the arguments of the schema.
        fake: the same arguments to uninitialised outputs of the right shape and layout.
        flops: the same arguments to the forward FLOPs, with shapes in the place of tensors.
        backward_flops: to the FLOPs of the backward op; ``mask`` says which gradients are wanted.
        batched: the tensor arguments whose first dimension is the batch; all outputs have it too.
        autocast: ``"lower"`` casts to autocast's dtype, ``"float32"`` up, ``"widest"`` to the
            widest dtype among the arguments.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int],
        backward_flops: Callable[..., int],
        batched: tuple[str, ...],
        autocast: Literal["lower", "float32", "widest"],
    ) -> None:
        head, _, returns = schema.partition(" -> ")
        self.schema = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
        self.name = self.schema.name.removeprefix(f"{NAMESPACE}::")
        self.reference = reference
        self.fake = fake
        self.flops = flops
        self.backward_flops = backward_flops
        self.batched = batched
        self.autocast = autocast
        self.argument_names = [argument.name for argument in self.schema.arguments]
        self.tensors = [
            index
            for index, argument in enumerate(self.schema.arguments)
            if "Tensor" in str(argument.type)
        ]
        self.outputs = len(self.schema.returns)
        self.backends: dict[str, Backend] = {
            "reference": Backend(
                reference,
                self._reference_backward,
                _nothing_against,
                _nothing_against,
                _nothing_against,
            )
        }
        self._batched = [i for i in self.tensors if self.argument_names[i] in batched]
        # Why a compiled library has no kernels for this operator; "" where it has.
        self._missing: dict[str, str] = {}
        self._define(head, returns)
        OPERATORS[self.name] = self

    # -- backends ------------------------------------------------------------------------------

    def add_backend(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        why_not: Callable[..., str | None],
        declines: Callable[..., str | None] = _nothing_against,
        declines_backward: Callable[..., str | None] = _nothing_against,
        exact: bool = False,
    ) -> None:
        """Add another way to compute this operator; see :class:`Backend`."""
        self.backends[name] = Backend(
            forward, backward, why_not, declines, declines_backward, exact
        )

    def add_cpp(
        self,
        *,
        why_not: Callable[..., str | None] = _nothing_against,
        declines: Callable[..., str | None] = _nothing_against,
        declines_backward: Callable[..., str | None] = _nothing_against,
    ) -> None:
        """Add the kernels of the compiled CPU library under this operator's name.

        ``why_not`` speaks of the arguments alone: that the library is there, holds the kernels and
        that the tensors are on the CPU is checked before.
        """

        def reason(*args: Any) -> str | None:
            missing = self.why_no_cpp()
            if missing is not None:
                return missing
            if args[0].device.type != "cpu":
                return f"its kernels run on CPU tensors, got {args[0].device}"
            return why_not(*args)

        self.add_backend(
            "cpp",
            forward=_compiled(native.CPU, self.name),
            backward=_compiled(native.CPU, f"{self.name}_backward"),
            why_not=reason,
            declines=declines,
            declines_backward=declines_backward,
            exact=True,
        )

    def add_cuda(self, *, why_not: Callable[..., str | None] = _nothing_against) -> None:
        """Add the kernels of the compiled CUDA library under this operator's name.

        ``why_not`` speaks of the arguments alone: the library, device and dtype are checked before.
        "auto" prefers these kernels to Triton's where the table in ``choice.py`` says so.
        """

        def reason(*args: Any) -> str | None:
            return _why_no_cuda(args[0]) or self._why_no(native.CUDA) or why_not(*args)

        def slow(*args: Any) -> str | None:
            choice = _choice(self.name, *args)
            if choice.backend == "cuda" or self.why_not("triton", *args) is not None:
                return None
            return f"its table says {choice}"

        self.add_backend(
            "cuda",
            forward=_compiled(native.CUDA, self.name),
            backward=_compiled(native.CUDA, f"{self.name}_backward"),
            why_not=reason,
            declines=slow,
            declines_backward=slow,
            exact=True,
        )

    def add_triton(
        self,
        module: str,
        *,
        why_not: Callable[..., str | None] = _nothing_against,
        declines: Callable[..., str | None] = _nothing_against,
    ) -> None:
        """Add the Triton launchers ``<name>`` and ``<name>_backward`` of a module.

        The module is imported at the first call. ``why_not`` and ``declines`` speak of the
        arguments alone: Triton, device and dtype are checked before.
        """

        def reason(*args: Any) -> str | None:
            return _why_no_triton(args[0]) or why_not(*args)

        def slow(*args: Any) -> str | None:
            if args[0].device.type == "cpu":
                return "the interpreter is for checks"
            return declines(*args)

        self.add_backend(
            "triton",
            forward=_launcher(module, self.name),
            backward=_launcher(module, f"{self.name}_backward"),
            why_not=reason,
            declines=slow,
            declines_backward=slow,
            exact=True,
        )

    def why_no_cpp(self) -> str | None:
        """None when the compiled CPU library is there and holds this operator's kernels."""
        return self._why_no(native.CPU)

    def _why_no(self, library: str) -> str | None:
        """None when a compiled library is there and holds this operator's kernels."""
        missing = self._missing.get(library)
        if missing is None:
            missing = native.why_not(library) or ""
            for name in (self.name, f"{self.name}_backward"):
                if not missing and not native.holds(library, name):
                    missing = f"the compiled {library.upper()} library has no kernel for {name}"
            self._missing[library] = missing
        return missing or None

    def why_not(self, name: str, *args: Any) -> str | None:
        """None when the backend can compute this operator on these arguments, else the reason."""
        if name not in self.backends:
            return f"no {name} kernel is written for {self.name} yet"
        return self.backends[name].why_not(*args)

    def choose(self, wish: str, *args: Any, backward: bool = False) -> Backend:
        """The backend to run one of the passes, by the rules of the module's head."""
        wish = wished_backend(wish)
        if wish != "auto":
            reason = self.why_not(wish, *args)
            if reason is not None:
                raise RuntimeError(f"{self.name}: backend {wish!r} cannot run this: {reason}")
            return self.backends[wish]
        for name in BACKENDS:
            candidate = self.backends.get(name)
            if candidate is None:
                reason = "not written yet"
            else:
                slower = candidate.declines_backward if backward else candidate.declines
                reason = candidate.why_not(*args) or slower(*args)
                if reason is None:
                    return candidate
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s: not %s: %s", self.name, name, reason)
        raise AssertionError("the reference backend takes everything")

    # -- calling -------------------------------------------------------------------------------

    def __call__(self, *args: Any, backend: str = "auto") -> Any:
        """Run the op; the arguments are checked by the public function, the backend's name here."""
        if not isinstance(backend, str) or backend not in CHOICES:
            from fastfusion.ops import checks

            checks.choice("backend", backend, CHOICES)
        if _nobody_watches(args):
            return self._forward(*args, backend)
        return self.op(*args, backend)

    def __repr__(self) -> str:
        return f"Operator({self.name}, backends={list(self.backends)})"

    # -- the two ops ---------------------------------------------------------------------------

    def _define(self, head: str, returns: str) -> None:
        name, _, arguments = head.partition("(")
        arguments = arguments.removesuffix(")")
        _library.define(f"{name}({arguments}, str backend) -> {returns}")
        grads = ", ".join(f"Tensor grad_{index}" for index in range(self.outputs))
        gradients = ", ".join(["Tensor"] * len(self.tensors))
        gradients = f"({gradients})" if len(self.tensors) > 1 else gradients
        _library.define(
            f"{name}_backward({grads}, {arguments}, bool[] mask, str backend) -> {gradients}"
        )
        self.op = getattr(torch.ops.fastfusion, name).default
        self.backward_op = getattr(torch.ops.fastfusion, f"{name}_backward").default

        _library.impl(name, self._forward, "CompositeExplicitAutograd")
        _library.impl(f"{name}_backward", self._backward, "CompositeExplicitAutograd")
        for qualified, fake in (
            (f"{NAMESPACE}::{name}", lambda *args: self.fake(*args[:-1])),
            (f"{NAMESPACE}::{name}_backward", self._fake_backward),
        ):
            torch.library.register_fake(qualified, fake, lib=_library)
        for op, derivative, definition in (
            (self.op, self._differentiate, self._define_forward),
            (self.backward_op, self._differentiate_twice, self._refuse_forward_over_reverse),
        ):
            kernel = _autograd_kernel(op, self._save, derivative, definition)
            _library.impl(op.overloadpacket.__name__, kernel, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", self._vmap, lib=_library)
        torch.library.register_vmap(
            f"{NAMESPACE}::{name}_backward", self._vmap_backward, lib=_library
        )
        for device in ("CPU", "CUDA"):
            _library.impl(name, self._autocast_rule(device), f"Autocast{device}")
        register_flops(self.op.overloadpacket, self._count)
        register_flops(self.backward_op.overloadpacket, self._count_backward)

    def _forward(self, *args: Any) -> Any:
        *args, wish = args  # type: ignore[assignment]
        if self._empty(args):
            return _map(torch.zeros_like, self.fake(*args))
        chosen = self.choose(wish, *args)
        result = chosen.forward(*args)
        return result if chosen.exact else _conform(result, self.fake(*args), args)

    def _backward(self, *args: Any) -> Any:
        *args, mask, wish = args  # type: ignore[assignment]
        inputs = args[self.outputs :]
        if self._empty(inputs) or not any(mask):
            return _map(torch.zeros_like, self._fake_backward(*args, mask, wish))
        chosen = self.choose(wish, *inputs, backward=True)
        result = chosen.backward(*args, mask)
        if chosen.exact:
            return result
        return _conform(result, self._fake_backward(*args, mask, wish), args)

    def _fake_backward(self, *args: Any) -> Any:
        *args, mask, _ = args  # type: ignore[assignment]
        inputs = args[self.outputs :]
        found = []
        for index, wanted in zip(self.tensors, mask, strict=True):
            value = inputs[index]
            if not wanted:
                found.append(args[0].new_empty(0))
            elif self.argument_names[index] in self.batched:
                found.append(image_like(value))
            else:
                found.append(value.new_empty(value.shape))
        return tuple(found) if len(found) > 1 else found[0]

    def _reference_backward(self, *args: Any) -> Any:
        """The vector-Jacobian product of the definition, by autograd."""
        *args, mask = args  # type: ignore[assignment]
        grads, inputs = args[: self.outputs], list(args[self.outputs :])
        wanted = [index for index, needed in zip(self.tensors, mask, strict=True) if needed]
        # Ops below autograd see no graph of their caller: build one here, for the definition.
        with torch.enable_grad(), _autograd_on():
            for index in wanted:
                inputs[index] = inputs[index].detach().requires_grad_()
            outputs = _as_tuple(self.reference(*inputs))
            found = torch.autograd.grad(
                outputs, [inputs[index] for index in wanted], grads, materialize_grads=True
            )
        gradients = dict(zip(wanted, found, strict=True))
        filled = tuple(
            gradients[index].detach() if index in gradients else grads[0].new_empty(0)
            for index in self.tensors
        )
        return filled if len(filled) > 1 else filled[0]

    def _empty(self, inputs: Sequence[Any]) -> bool:
        """Whether there is nothing to compute: an image with no pixel or a batch with no image."""
        for index in self._batched:
            value = inputs[index]
            if value is not None and value.numel() == 0:
                return True
        return False

    # -- autograd ------------------------------------------------------------------------------

    @staticmethod
    def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
        *args, wish = inputs
        ctx.wish = wished_backend(wish)
        ctx.template = [None if isinstance(value, Tensor) else value for value in args]
        ctx.places = [index for index, value in enumerate(args) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(args[index] for index in ctx.places))

    @staticmethod
    def _saved(ctx: Any) -> list[Any]:
        args = list(ctx.template)
        for index, value in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[index] = value
        return args

    def _differentiate(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = self._saved(ctx)
        mask = [
            bool(ctx.needs_input_grad[index + 1]) and args[index] is not None
            for index in self.tensors
        ]
        found = _as_tuple(self.backward_op(*grads, *args, mask, ctx.wish))
        result: list[Tensor | None] = [None] * (len(args) + 1)
        for index, wanted, gradient in zip(self.tensors, mask, found, strict=True):
            if wanted:
                result[index] = gradient
        return tuple(result)

    def _differentiate_twice(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the backward op: that of the definition's, by autograd, twice."""
        *args, mask = self._saved(ctx)
        result: list[Tensor | None] = [None] * (len(args) + 2)
        wanted = [index for index, needed in zip(self.tensors, mask, strict=True) if needed]
        seeds = [grad for grad, needed in zip(grads, mask, strict=True) if needed]
        with torch.enable_grad():
            args = [
                value.detach().requires_grad_() if isinstance(value, Tensor) else value
                for value in args
            ]
            leaves = [index for index, value in enumerate(args) if isinstance(value, Tensor)]
            upstream, inputs = args[: self.outputs], args[self.outputs :]
            outputs = _as_tuple(self.reference(*inputs))
            first = torch.autograd.grad(
                outputs,
                [inputs[index] for index in wanted],
                upstream,
                create_graph=True,
                materialize_grads=True,
            )
            # A gradient that depends on nothing (a linear operator's) has no graph to follow.
            followed = [(g, s) for g, s in zip(first, seeds, strict=True) if g.requires_grad]
            if followed:
                found = torch.autograd.grad(
                    [g for g, _ in followed],
                    [args[index] for index in leaves],
                    [s for _, s in followed],
                    allow_unused=True,
                )
                for index, gradient in zip(leaves, found, strict=True):
                    result[index] = gradient
        return tuple(result)

    # Forward-mode differentiation (`torch.func.jvp`) goes through the definition, op by op.
    def _define_forward(self, *args: Any) -> Any:
        return self.reference(*args[:-1])

    def _refuse_forward_over_reverse(self, *args: Any) -> Any:
        raise NotImplementedError(
            f"{self.name}: a gradient cannot be differentiated in forward mode "
            "(torch.func.hessian, jvp of grad); reverse mode can: jacrev of jacrev, grad of grad"
        )

    # -- vmap ----------------------------------------------------------------------------------

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped dimension into the batch, or loop where a parameter is mapped."""
        mapped = [index for index, dim in enumerate(in_dims) if isinstance(dim, int)]
        if any(self.argument_names[index] not in self.batched for index in mapped):
            return self._loop(self.op, info.batch_size, in_dims, args)
        folded = list(args)
        for index in self.tensors:
            value, dim = args[index], in_dims[index]
            if value is None or self.argument_names[index] not in self.batched:
                continue
            value = (
                value.movedim(dim, 0)
                if dim is not None
                else value.expand(info.batch_size, *value.shape)
            )
            folded[index] = value.flatten(0, 1)
        result = self.op(*folded)
        unfolded = _map(lambda y: y.unflatten(0, (info.batch_size, -1)), result)
        return unfolded, _map(lambda y: 0, result)

    def _vmap_backward(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        # Gradients of parameters are sums over the batch, so the batch cannot take the dimension.
        return self._loop(self.backward_op, info.batch_size, in_dims, args)

    @staticmethod
    def _loop(
        op: Callable[..., Any], count: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        rows = [
            _as_tuple(
                op(
                    *(
                        value.select(dim, row) if isinstance(dim, int) else value
                        for value, dim in zip(args, in_dims, strict=True)
                    )
                )
            )
            for row in range(count)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        if len(stacked) == 1:
            return stacked[0], 0
        return stacked, (0,) * len(stacked)

    # -- autocast ------------------------------------------------------------------------------

    def _autocast_rule(self, device: str) -> Callable[..., Any]:
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")

        def cast_and_call(*args: Any) -> Any:
            tensors = [args[index] for index in self.tensors if args[index] is not None]
            if self.autocast == "lower":
                dtype = torch.get_autocast_dtype(device.lower())
            elif self.autocast == "float32":
                dtype = torch.float32
            else:
                dtype = tensors[0].dtype
                for value in tensors[1:]:
                    dtype = torch.promote_types(dtype, value.dtype)
            # float64 is asked for on purpose: autocast leaves it alone, and so does this rule.
            if any(value.dtype == torch.float64 for value in tensors):
                dtype = torch.float64
            cast = [value.to(dtype) if isinstance(value, Tensor) else value for value in args]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return self.op(*cast)

        return cast_and_call

    # -- FLOPs ---------------------------------------------------------------------------------

    def _count(self, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(self.flops(*args[:-1]))

    def _count_backward(self, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        *args, mask, _ = args  # type: ignore[assignment]
        wanted = {
            self.argument_names[index]
            for index, needed in zip(self.tensors, mask, strict=True)
            if needed
        }
        return int(self.backward_flops(*args[self.outputs :], wanted=wanted))


# -- small helpers -----------------------------------------------------------------------------


def _nobody_watches(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would do nothing but call the op's implementation.

    So it is where all tensors are plain ones on the CPU, none wants a gradient, and there is no
    mode, transformation, autocast, tracing or profiling; its way takes longer than small images do.
    """
    if torch.compiler.is_compiling():
        return False
    plain, threads = _plain_keys()
    wanted = torch.is_grad_enabled()
    for value in args:
        if isinstance(value, Tensor) and (
            type(value) not in _PLAIN
            or torch._C._dispatch_keys(value).raw_repr() not in plain
            or (wanted and value.requires_grad)
        ):
            return False
    state = (
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
    )
    return (
        state in threads
        and forward_ad._current_level < 0
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd.profiler._is_profiler_enabled
    )


@functools.cache
def _plain_keys() -> tuple[set[int], set[tuple[int, int]]]:
    """The dispatch keys of plain tensors, and of a thread that does nothing special."""
    tensors, threads = set(), set()

    def look() -> None:  # in a thread of its own, which no mode of the caller's reaches
        for context in (contextlib.nullcontext(), torch.inference_mode()):
            with context:
                tensors.add(torch._C._dispatch_keys(torch.empty(0)).raw_repr())
                threads.add(
                    (
                        torch._C._dispatch_tls_local_include_set().raw_repr(),
                        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
                    )
                )

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return tensors, threads


def _autograd_kernel(
    op: Any,
    save: Callable[..., None],
    derivative: Callable[..., tuple[Tensor | None, ...]],
    definition: Callable[..., Any],
) -> Callable[..., Any]:
    """The op's kernel for autograd: what ``torch.library.register_autograd`` makes, and more.

    That one cannot be used under ``torch.func.grad``, because it goes through the public
    ``autograd.Function``, which insists on handling all levels of ``torch.func`` itself. Here the
    dispatcher has already brought the call to one level, so a function of a single level is right.
    """

    class Node(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            save(ctx, args)
            # Autograd has switched forward mode off, for the levels of `torch.func` below too.
            with torch._C._AutoDispatchBelowAutograd(), forward_ad._set_fwd_grad_enabled(True):
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return None, *derivative(ctx, *grads)

    Node.__name__ = Node.__qualname__ = f"{op.overloadpacket.__name__}_autograd"

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            return definition(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # torch._functorch.utils.enable_single_level_autograd_function, without its generator:
            # Ctrl-C as that is entered ends in an UnboundLocalError.
            earlier = get_single_level_autograd_function_allowed()
            try:
                set_single_level_autograd_function_allowed(True)
                return Node.apply(keyset, *args)  # type: ignore[attr-defined]
            finally:
                set_single_level_autograd_function_allowed(earlier)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _autograd_on() -> contextlib.AbstractContextManager[None]:
    """Let autograd record again inside an op's implementation, which runs below it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    return torch._C._SetExcludeDispatchKeyGuard(key, False)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(function(item) for item in value)
    return function(value)


def _compiled(library: str, name: str) -> Callable[..., Any]:
    """A kernel of a compiled library, looked up at its first call."""
    lookup = functools.cache(lambda: native.kernel(library, name))
    return lambda *args: lookup()(*args)


def _launcher(module: str, name: str) -> Callable[..., Any]:
    """A Triton launcher, looked up at its first call."""
    lookup = functools.cache(lambda: getattr(importlib.import_module(module), name))
    return lambda *args: lookup()(*args)


def _why_no_triton(x: Tensor) -> str | None:
    if not triton_installed():
        return "triton is not installed"
    if x.device.type == "cpu":
        if not _interpreting():
            return "its kernels run on a GPU, or on the CPU with TRITON_INTERPRET=1 (for checks)"
    elif x.device.type != "cuda":
        return f"its kernels run on a GPU, got {x.device}"
    elif not torch.version.hip and torch.cuda.get_device_capability(x.device) < (8, 0):
        return _TOO_OLD
    if x.dtype == torch.float64:
        return _NO_DOUBLES
    return None


_TOO_OLD = "its kernels need compute capability 8.0 (sm_80) or later"
_NO_DOUBLES = "its kernels compute in float32, got float64"


def _why_no_cuda(x: Tensor) -> str | None:
    if x.device.type != "cuda" or torch.version.hip:
        return f"its kernels run on an NVIDIA GPU, got {x.device}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return _TOO_OLD
    return _NO_DOUBLES if x.dtype == torch.float64 else None


@functools.cache
def _interpreting() -> bool:  # Triton reads it once, too
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _conform(result: Any, promised: Any, inputs: Sequence[Any]) -> Any:
    """Give the result the layout of the fake kernel's, and memory of its own."""
    taken = {
        value.untyped_storage().data_ptr()
        for value in inputs
        if isinstance(value, Tensor) and value.numel()
    }
    conformed = []
    for value, like in zip(_as_tuple(result), _as_tuple(promised), strict=True):
        layout = layout_of(like)
        value = value.contiguous(memory_format=layout)
        if value.numel():
            pointer = value.untyped_storage().data_ptr()
            if pointer in taken:
                value = value.clone(memory_format=layout)
                pointer = value.untyped_storage().data_ptr()
            taken.add(pointer)
        conformed.append(value)
    return tuple(conformed) if isinstance(result, (tuple, list)) else conformed[0]
