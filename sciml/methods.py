"""The methods of the library: one row each, from which README and docs tables are made.

``status`` says what is proved: *stable* = identities, reference numbers and the headline
experiment pass; *beta* = identities and reference numbers; *partial* = details of the paper
are unknown and the class docstring lists them.
"""

from typing import NamedTuple

__all__ = ["METHODS", "Method", "table"]


class Method(NamedTuple):
    """One method: its name, its use, where it lives, its paper and what is proved of it."""

    name: str
    use: str
    where: str
    paper: str
    status: str


METHODS: tuple[Method, ...] = (
    Method(
        "NTK and NNGP kernels",
        "use infinitely wide ReLU networks as kernels in any kernel machine",
        "sciml.kernels.ntk:NTK",
        "arXiv:1806.07572, arXiv:1902.06720",
        "stable",
    ),
    Method(
        "Kernel machines of infinitely wide networks",
        "classify or regress by the machine that a trained infinitely wide network becomes",
        "sciml.kernels.kernel_machine:KernelMachineClassifier",
        "arXiv:2111.06063",
        "stable",
    ),
    Method(
        "Robustness certificates of NTK machines",
        "prove the radius within which a machine of an infinitely wide network keeps its decision",
        "sciml.kernels.certificates:certified_radius",
        "arXiv:2111.06063",
        "stable",
    ),
    Method(
        "Finite networks as kernel machines",
        "train a finite ReLU network together with the kernel machine that it is",
        "sciml.kernels.ntk_network:NTKNetwork",
        "arXiv:2111.06063",
        "stable",
    ),
    Method(
        "Ridge-leverage Nyström features",
        "approximate a kernel from landmarks that matter, in one pass, streamed or merged",
        "sciml.kernels.nystroem:RidgeLeverageNystroem",
        "arXiv:1803.10172, arXiv:1810.13258, arXiv:1605.07583",
        "stable",
    ),
    Method(
        "INK-Estimate",
        "choose landmarks sequentially from all columns of a kernel matrix",
        "sciml.kernels.ink_estimate:ink_estimate",
        "arXiv:2604.20077",
        "partial",
    ),
    Method(
        "Nyström kernel ridge regression",
        "fit kernel ridge regression to many rows or to a stream",
        "sciml.kernels.nystroem_ridge:NystroemRidge",
        "arXiv:2604.20077, arXiv:1705.10958",
        "stable",
    ),
    Method(
        "Learned proximal networks",
        "learn a prior from clean images whose proximal operator is the network",
        "sciml.inverse.lpn:LearnedProximalNetwork",
        "arXiv:2310.14344",
        "stable",
    ),
    Method(
        "Proximal matching",
        "train a denoiser towards the most probable clean image, not the mean",
        "sciml.inverse.proximal_matching:proximal_matching_loss",
        "arXiv:2310.14344",
        "stable",
    ),
    Method(
        "Evaluation of a learned prior",
        "invert a proximal network, and score images by the prior it has learned",
        "sciml.inverse.lpn_prior:LPNPrior",
        "arXiv:2310.14344",
        "stable",
    ),
    Method(
        "LPN denoiser",
        "denoise and score plain arrays with an estimator that learns from clean samples",
        "sciml.inverse.lpn_denoiser:LPNDenoiser",
        "arXiv:2310.14344",
        "stable",
    ),
    Method(
        "Plug-and-play ADMM with certificate",
        "reconstruct images by an iteration whose convergence conditions are checked",
        "sciml.inverse.pnp:pnp_admm",
        "arXiv:2310.14344",
        "stable",
    ),
    Method(
        "GFI: Latent U-Net, Invertible X-Net",
        "predict seismic velocity from shot gathers, shot gathers from velocity, or both",
        "sciml.inverse.seismic.gfi_model:GFIModel",
        "arXiv:2410.11247",
        "beta",
    ),
    Method(
        "GFI regressor",
        "fit a seismic network to arrays or DataArrays and predict in physical units",
        "sciml.inverse.seismic.gfi_regressor:GFIRegressor",
        "arXiv:2410.11247",
        "beta",
    ),
    Method(
        "ForwardGNN node classification",
        "train a graph network layer by layer, with memory that does not grow with depth",
        "sciml.graphs.forward_gnn:ForwardGNNClassifier",
        "arXiv:2403.11004",
        "stable",
    ),
    Method(
        "ForwardGNN link prediction",
        "predict links with a graph network trained layer by layer",
        "sciml.graphs.link_prediction:ForwardGNNLinkPredictor",
        "arXiv:2403.11004",
        "stable",
    ),
    Method(
        "Forward-Forward",
        "train a network layer by layer to tell true from wrong labels by its activity",
        "sciml.layerwise.forward_forward:ForwardForwardClassifier",
        "arXiv:2212.13345",
        "stable",
    ),
    Method(
        "Mono-Forward",
        "train a network layer by layer, each with a classifier of its own, in constant memory",
        "sciml.layerwise.mono_forward:MonoForwardClassifier",
        "arXiv:2501.09238",
        "stable",
    ),
    Method(
        "Cascaded Forward",
        "classify images by linear heads on random or feedback-aligned convolutional blocks",
        "sciml.layerwise.cascaded_forward:CascadedForwardClassifier",
        "arXiv:2303.09728",
        "stable",
    ),
    Method(
        "Backpropagation twin",
        "train the same networks end to end, as the baseline of layer-local training",
        "sciml.layerwise.backprop:BackpropClassifier",
        "arXiv:2509.19063",
        "stable",
    ),
    Method(
        "Fair comparison of trainers",
        "compare accuracy, time, memory and energy of trainers that got the same search budget",
        "sciml.layerwise.compare_trainers:compare_trainers",
        "arXiv:2509.19063",
        "stable",
    ),
    Method(
        "χPO",
        "align to preferences with an objective that does not over-optimise as DPO does",
        "sciml.lm.chipo:chipo_loss",
        "arXiv:2407.13399",
        "stable",
    ),
    Method(
        "EKSFT",
        "fine-tune without forcing the tokens that are uncertain or drift",
        "sciml.lm.eksft:eksft_loss",
        "arXiv:2605.29303",
        "partial",
    ),
    Method(
        "Mask the Target",
        "fine-tune with LoRA and keep what the base model prefers beside the target",
        "sciml.lm.mask_the_target:target_masked_kl",
        "arXiv:2605.29498",
        "partial",
    ),
    Method(
        "Learning from the undesirable",
        "make hidden states insensitive to a simulated bad update while fine-tuning",
        "sciml.lm.lfu:LfURegularizer",
        "arXiv:2511.13052",
        "partial",
    ),
    Method(
        "KL control and distribution matching",
        "fine-tune a language model to a target distribution of rewards, constraints or moments",
        "sciml.lm.distribution_matcher:DistributionMatcher",
        "arXiv:2205.11275, arXiv:2012.11635, arXiv:2302.08215, arXiv:2206.00761",
        "stable",
    ),
    Method(
        "PS-KD",
        "train classifiers on their own earlier predictions for better likelihood",
        "sciml.lm.pskd_classifier:PSKDClassifier",
        "arXiv:2006.12000",
        "beta",
    ),
    Method(
        "Masked-input regularisation",
        "pre-train for many epochs on little text with less over-fitting",
        "sciml.lm.mir:mir_loss",
        "arXiv:2606.06888",
        "stable",
    ),
    Method(
        "SoftQ scaling law",
        "predict the loss of tuned runs from parameters and unique tokens",
        "sciml.lm.scaling_laws:SoftQ",
        "arXiv:2606.06888",
        "partial",
    ),
    Method(
        "Chinchilla and data-constrained scaling laws",
        "predict the loss of runs from parameters, tokens and epochs",
        "sciml.lm.scaling_laws:DataConstrained",
        "arXiv:2203.15556, arXiv:2305.16264",
        "stable",
    ),
    Method(
        "Distillation by prefix and direction",
        "distil a language model on its own or the teacher's text, by forward or reverse KL",
        "sciml.lm.distillation:Distiller",
        "arXiv:2605.16826",
        "beta",
    ),
    Method(
        "Entropy-gated length curriculum",
        "let generated text grow longer only while the student's entropy holds",
        "sciml.lm.length_curriculum:EntropyGatedLengthCurriculum",
        "arXiv:2605.16826",
        "partial",
    ),
    Method(
        "PACED",
        "weight problems by the student's pass rate, so that hopeless ones do no harm",
        "sciml.lm.paced:beta_kernel_weights",
        "arXiv:2603.11178",
        "partial",
    ),
    Method(
        "TRACE",
        "reinforce and distil from a hinted self, by KL on a few marked spans alone",
        "sciml.lm.trace_trainer:TraceTrainer",
        "arXiv:2605.10194",
        "partial",
    ),
    Method(
        "X-Token P-KL",
        "distil a teacher that has another tokenizer, by projecting vocabularies",
        "sciml.lm.cross_tokenizer:projected_kl_loss",
        "arXiv:2605.21699",
        "stable",
    ),
    Method(
        "X-Token H-KL and GOLD",
        "distil a teacher that has another tokenizer, by the tokens both share",
        "sciml.lm.cross_tokenizer:hybrid_kl_loss",
        "arXiv:2605.21699",
        "beta",
    ),
    Method(
        "ULD",
        "distil a teacher that has another tokenizer, by sorted probabilities",
        "sciml.lm.uld:uld_loss",
        "arXiv:2402.12030",
        "beta",
    ),
    Method(
        "GRPO",
        "reinforce responses by how much better than their group they were rewarded",
        "sciml.lm.grpo:grpo_loss",
        "arXiv:2402.03300",
        "beta",
    ),
)


def table() -> str:
    """Return the methods as a Markdown table.

    Returns
    -------
    str
        Table with the columns method, use, where, paper and status.
    """
    lines = ["| method | use it to | where | paper | status |", "|---|---|---|---|---|"]
    for method in METHODS:
        module, _, name = method.where.partition(":")
        cells = (method.name, method.use, f"`{module}.{name}`", method.paper, method.status)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    # `python -m sciml.methods README.md` renews the table between its two markers.
    import sys
    from pathlib import Path

    readme = Path(sys.argv[1])
    before, rest = readme.read_text(encoding="utf-8").split("<!-- methods -->\n", 1)
    after = rest.split("<!-- /methods -->", 1)[1]
    readme.write_text(
        f"{before}<!-- methods -->\n{table()}\n<!-- /methods -->{after}", encoding="utf-8"
    )
