"""Cut a graph neural network of PyG into stages that can be trained one by one.

A stage is one message-passing layer with what follows it: convolution, normalisation, activation
and dropout in the order of PyG's model zoo, with the activation applied after every convolution,
the last one included. Modules that come as instances are copied, never modified.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GIN, PNA, EdgeCNN, GraphSAGE, MessagePassing
from torch_geometric.nn import Sequential as GraphSequential
from torch_geometric.nn.models.basic_gnn import BasicGNN
from torch_geometric.utils import degree

from sciml._check import check_integer

__all__ = [
    "GraphStage",
    "has_fixed_widths",
    "initialise_stages",
    "layer_widths",
    "make_stages",
    "stages_from_model",
    "unit_rows",
]

ZOO: dict[str, type[BasicGNN]] = {
    "GCN": GCN,
    "GraphSAGE": GraphSAGE,
    "GIN": GIN,
    "GAT": GAT,
    "PNA": PNA,
    "EdgeCNN": EdgeCNN,
}
ACCEPTED = (
    f"one of {', '.join(map(repr, ZOO))}, a BasicGNN class or instance, a list of convolutions, "
    "a torch_geometric.nn.Sequential, or a callable (in_channels, out_channels) -> convolution"
)


def unit_rows(x: Tensor) -> Tensor:
    """Divide every row by its Euclidean norm; a row of zeros stays zero.

    Parameters
    ----------
    x : Tensor of shape (..., n_features)
        Any values.

    Returns
    -------
    Tensor of shape (..., n_features)
        ``x / (||x|| + 1e-8)``.

    Examples
    --------
    >>> import torch
    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-8)


class GraphStage(nn.Module):
    """One message-passing layer with its normalisation, activation and dropout.

    Parameters
    ----------
    conv : torch.nn.Module
        Called as ``conv(x, edge_index)``, with ``edge_weight`` and ``edge_attr`` where its
        ``forward`` takes them and the graph has them.
    after : iterable of torch.nn.Module, default=()
        Applied in order to the output of `conv`.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.nn import GCNConv
    >>> stage = GraphStage(GCNConv(3, 2), [torch.nn.ReLU()])
    >>> stage(torch.ones(4, 3), torch.tensor([[0, 1], [1, 2]])).shape
    torch.Size([4, 2])
    """

    def __init__(self, conv: nn.Module, after: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.conv = conv
        self.after = nn.ModuleList(after)
        self.out_channels: int | None = None  # known once the stage has run on some input
        taken = inspect.signature(conv.forward).parameters
        self.takes_edge_weight = "edge_weight" in taken
        self.takes_edge_attr = "edge_attr" in taken and getattr(conv, "edge_dim", 1) is not None
        # These compute a row from other rows, so they need all of them.
        self.mixes_rows = any(
            isinstance(module, nn.modules.batchnorm._NormBase)
            or type(module).__module__.startswith("torch_geometric.nn.norm")
            for module in self.modules()
        )

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Tensor:
        """Return the output of every node, shape (n_nodes, out_channels)."""
        extra = {}
        if self.takes_edge_weight and edge_weight is not None:
            extra["edge_weight"] = edge_weight
        if self.takes_edge_attr and edge_attr is not None:
            extra["edge_attr"] = edge_attr
        return self.finish(self.conv(x, edge_index, **extra))

    def finish(self, h: Tensor) -> Tensor:
        """Apply what follows the convolution."""
        for module in self.after:
            h = module(h)
        return h

    def reset_parameters(self) -> None:
        """Draw new initial parameters."""
        for module in (self.conv, *self.after):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def stages_from_model(
    model: Any,
    widths: Sequence[tuple[int, int]],
    model_kwargs: dict[str, Any] | None,
    edge_index: Tensor,
    num_nodes: int,
) -> list[GraphStage]:
    """Build one stage per (in_channels, out_channels) of `widths`, or copy those of an instance.

    Parameters
    ----------
    model : object
        See ``model`` of `ForwardGNNClassifier`.
    widths : sequence of (int, int)
        Used by classes and callables. Instances have their own number of layers and widths.
    model_kwargs : dict or None
        Further arguments of a zoo class.
    edge_index : LongTensor of shape (2, n_edges)
        Graph from which PNA's histogram of degrees is counted when it is not given.
    num_nodes : int
        Nodes of that graph.

    Returns
    -------
    list of GraphStage
        Parameters of lazy modules may still be uninitialised.

    Raises
    ------
    TypeError, ValueError
        If `model` cannot be cut into stages, or an argument does not fit it.
    """
    kwargs = dict(model_kwargs or {})
    if isinstance(model, str):
        if model not in ZOO:
            raise ValueError(f"model must be {ACCEPTED}, got {model!r}")
        model = ZOO[model]
    if isinstance(model, type) and issubclass(model, BasicGNN):
        if model is PNA:
            kwargs.setdefault("aggregators", ["mean", "min", "max", "std"])
            kwargs.setdefault("scalers", ["identity", "amplification", "attenuation"])
            if "deg" not in kwargs:
                in_degree = degree(edge_index[1], num_nodes, dtype=torch.long)
                kwargs["deg"] = torch.bincount(in_degree).cpu()
        return [_zoo_stage(model, *pair, kwargs) for pair in widths]
    if kwargs:
        raise ValueError(
            f"model_kwargs is for zoo names and BasicGNN classes, got it with {type(model)}"
        )
    if isinstance(model, BasicGNN):
        return _stages_of_instance(model)
    if isinstance(model, GraphSequential):
        return _stages_of_sequential(model)
    if isinstance(model, (list, tuple, nn.ModuleList)):
        _check_all_modules(model)
        if not any(isinstance(module, MessagePassing) for module in model):
            raise ValueError("model is a list without a message-passing layer")
        return _group(list(model))
    if isinstance(model, nn.Module) or (
        isinstance(model, type) and issubclass(model, nn.Module) and not _is_conv_class(model)
    ):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        reason = {
            "LINKX": "its adjacency weight has one row per node, so class nodes cannot be added, "
            "and it has no list of convolutions",
            "GraphUNet": "its pooling changes the set of nodes between layers",
        }.get(name, "it has no list of convolutions applied one after the other")
        raise TypeError(f"model of type {name} cannot be trained by layers: {reason}")
    if callable(model):
        stages = []
        for pair in widths:
            conv = model(*pair)
            if not isinstance(conv, nn.Module):
                raise TypeError(f"model({pair[0]}, {pair[1]}) must return a Module, got {conv!r}")
            stages.append(conv if isinstance(conv, GraphStage) else GraphStage(conv, [nn.ReLU()]))
        return stages
    raise TypeError(f"model must be {ACCEPTED}, got {model!r}")


def has_fixed_widths(model: Any) -> bool:
    """Tell whether `model` comes with its own layers, so that their number and widths are fixed."""
    return isinstance(model, (nn.Module, list, tuple))


def layer_widths(hidden_channels: int | Sequence[int], num_layers: int) -> list[int]:
    """Return the width of each layer, or raise if the arguments do not fit each other."""
    check_integer("num_layers", num_layers, 1)
    if isinstance(hidden_channels, (list, tuple)):
        if len(hidden_channels) != num_layers:
            raise ValueError(
                f"hidden_channels must hold num_layers={num_layers} widths, got {hidden_channels}"
            )
        for width in hidden_channels:
            check_integer("hidden_channels", width, 1)
        return [int(width) for width in hidden_channels]
    check_integer("hidden_channels", hidden_channels, 1)
    return [int(hidden_channels)] * num_layers  # type: ignore[arg-type]


def make_stages(
    model: Any,
    model_kwargs: dict[str, Any] | None,
    *,
    in_channels: int,
    widths: list[int],
    extra: list[int],
    data: Data,
    edge_index: Tensor,
    num_nodes: int,
) -> list[GraphStage]:
    """Build the stages, initialise lazy ones and check that each takes what it will be given.

    Parameters
    ----------
    model, model_kwargs
        See `stages_from_model`.
    in_channels : int
        Features of the nodes, without label columns.
    widths : list of int
        Width of every layer, where `model` leaves it open.
    extra : list of int
        Columns that each layer reads besides the output of the one below: labels, or the state
        above. The last entry serves all further layers.
    data : Data
        Graph whose dtype and edge features the stages have to take.
    edge_index, num_nodes
        The graph with class nodes.
    """
    below = [in_channels, *widths[:-1]]
    pairs = [(b + e, w) for b, e, w in zip(below, extra, widths, strict=True)]
    stages = stages_from_model(model, pairs, model_kwargs, edge_index, num_nodes)
    if has_fixed_widths(model):
        extra = (extra + extra[-1:] * len(stages))[: len(stages)]
    return initialise_stages(stages, in_channels, extra, data)


def initialise_stages(
    stages: list[GraphStage], in_channels: int, extra: list[int], data: Data
) -> list[GraphStage]:
    """Run every stage on two nodes: lazy parameters are made, wrong widths are found."""
    edge_index = torch.tensor([[0, 1], [1, 0]])
    edge_attr = None if data.edge_attr is None else data.edge_attr[:1].cpu().expand(2, -1)
    width = in_channels
    for layer, (stage, columns) in enumerate(zip(stages, extra, strict=True)):
        stage.to(data.x.dtype).eval()
        x = torch.zeros(2, width + columns, dtype=data.x.dtype)
        if getattr(stage.conv, "edge_dim", None) is not None and edge_attr is None:
            raise ValueError(f"data.edge_attr is missing, but layer {layer + 1} has edge_dim")
        try:
            with torch.no_grad():
                stage.out_channels = stage(x, edge_index, None, edge_attr).shape[1]
        except RuntimeError as error:
            raise ValueError(
                f"model cannot be trained on this graph: layer {layer + 1} would read "
                f"{width + columns} columns ({width} of "
                f"{'data.x' if layer == 0 else f'layer {layer}'}, {columns} of labels or other "
                f"layers), but its convolution fails on that: {error}"
            ) from error
        width = stage.out_channels
    return stages


def _zoo_stage(
    cls: type[BasicGNN], in_channels: int, out_channels: int, kwargs: dict[str, Any]
) -> GraphStage:
    if taken := {"jk", "out_channels", "num_layers", "hidden_channels"} & set(kwargs):
        raise ValueError(f"model_kwargs must not hold {', '.join(map(repr, sorted(taken)))}")
    heads = kwargs.get("heads", 1)
    if cls is GAT and kwargs.get("concat", True) and out_channels % heads:
        raise ValueError(f"hidden_channels must be divisible by heads={heads}, got {out_channels}")
    # jk="last" keeps normalisation and activation after the last convolution, and its output
    # layer is left out, since each stage predicts by itself.
    gnn = cls(in_channels, out_channels, num_layers=1, jk="last", **kwargs)
    return GraphStage(_without_cache(gnn.convs[0]), _after(gnn, gnn.norms[0]))


def _after(gnn: BasicGNN, norm: nn.Module) -> list[nn.Module]:
    act = [] if gnn.act is None else [_as_module(gnn.act)]
    norms = [] if isinstance(norm, nn.Identity) else [norm]
    after = [*act, *norms] if gnn.act_first else [*norms, *act]
    return [*after, gnn.dropout] if gnn.dropout.p else after


def _stages_of_instance(gnn: BasicGNN) -> list[GraphStage]:
    if gnn.jk_mode is not None or hasattr(gnn, "lin"):
        warnings.warn(
            f"the jumping knowledge and output layer of {type(gnn).__name__} are left out: "
            "the predictions of all layers are summed anyway",
            stacklevel=4,
        )
    if isinstance(gnn.in_channels, (tuple, list)):
        raise ValueError(f"model must have one in_channels, got the pair {gnn.in_channels}")
    hidden = gnn.hidden_channels
    if gnn.jk_mode is None and gnn.out_channels != hidden:
        warnings.warn(
            f"the last layer of {type(gnn).__name__} is an output layer of width "
            f"{gnn.out_channels}; as a stage of its own it learns better with hidden_channels "
            f"(= {hidden}), which it has when out_channels=None",
            stacklevel=4,
        )
    return [
        GraphStage(_without_cache(copy.deepcopy(conv)), copy.deepcopy(_after(gnn, norm)))
        for conv, norm in zip(gnn.convs, gnn.norms, strict=True)
    ]


def _stages_of_sequential(model: GraphSequential) -> list[GraphStage]:
    last: list[str] | None = None
    modules = []
    for child in model._children:
        module = getattr(model, child.name)
        if not isinstance(module, nn.Module):
            module = _as_module(module)
        if last is not None and (child.param_names[0] != last[0] or len(child.return_names) != 1):
            raise ValueError(
                "model is a Sequential that is no chain: "
                f"{child.name} reads {', '.join(child.param_names)}, "
                f"but the module before it returns {', '.join(last)}"
            )
        modules.append(module)
        last = child.return_names
    return _group(modules)


def _group(modules: list[nn.Module]) -> list[GraphStage]:
    """Start a stage at each message-passing module; add a ReLU where no activation follows."""
    starts = [i for i, module in enumerate(modules) if isinstance(module, MessagePassing)]
    if not starts:
        raise ValueError("model has no message-passing layer")
    if starts[0] != 0:
        raise ValueError(
            f"model must begin with a message-passing layer, got {type(modules[0]).__name__}"
        )
    stages = []
    for start, stop in zip(starts, [*starts[1:], len(modules)], strict=True):
        after = copy.deepcopy(modules[start + 1 : stop])
        if not any(_is_activation(module) for module in after):
            after.append(nn.ReLU())
        stages.append(GraphStage(_without_cache(copy.deepcopy(modules[start])), after))
    return stages


def _without_cache(conv: Any) -> Any:
    # A convolution's own cache is of another graph than the one with class nodes.
    if getattr(conv, "cached", False):
        conv.cached = False
        conv._cached_edge_index = None
        conv._cached_adj_t = None
    return conv


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" or isinstance(module, _Function)


def _check_all_modules(model: Iterable[Any]) -> None:
    for module in model:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model is a list that must hold Modules, got {module!r}")


def _is_conv_class(model: type) -> bool:
    return issubclass(model, MessagePassing)


class _Function(nn.Module):
    """A plain function, such as `torch.relu`, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(function: Any) -> nn.Module:
    return function if isinstance(function, nn.Module) else _Function(function)
