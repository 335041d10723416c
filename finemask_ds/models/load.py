"""Backbones, heads and tokenizers from the hub, a folder or a fresh configuration; never foreign code or a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from finemask_ds.errors import UserError, abbreviated
from finemask_ds.masks.mask import Mask
from finemask_ds.models.families import TARGETS, Family, Place, family_of, head_parameters, max_positions, prunable
from finemask_ds.run import disk_full_is_user_error
from finemask_ds.silence import silent_output


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained masked language model theta_0 with its tokenizer.

    The weights are fp32 on the CPU as the checkpoint holds them; magnitudes are taken from here, before any cast.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    has_head: bool
    """False where the checkpoint has no MLM head and the model's is freshly drawn."""
    places: Mapping[str, Place] = field(repr=False)
    """Parameter name -> role and layer of every matrix to prune, in the order of ``named_parameters``."""

    @property
    def family(self) -> Family:
        """The table of this architecture's names."""
        return family_of(self.model.config.model_type)  # type: ignore[union-attr,arg-type]

    @property
    def targets(self) -> dict[str, Tensor]:
        """Parameter name -> weight of every matrix to prune (detached, not copied)."""
        weights = dict(self.model.named_parameters())
        return {name: weights[name].detach() for name in self.places}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of every matrix to prune."""
        return {name: tuple(weight.shape) for name, weight in self.targets.items()}

    @property
    def prunable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of every matrix that some choice of targets prunes, those of the pooler too."""
        parameters = self.model.named_parameters()
        return {name: tuple(parameter.shape) for name, parameter in parameters if self.family.place(name)}

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        return max_positions(self.model)

    def digest(self) -> str:
        """Which theta_0 this is, whatever file it came from; see ``backbone_sha256``."""
        return backbone_sha256(self.model)

    def load_head(self, state: Mapping[str, Tensor]) -> None:
        """Put other values into the MLM head's parameters, by name, in place."""
        with torch.no_grad():
            for name, parameter in head_parameters(self.model).items():
                parameter.copy_(state[name])


def backbone_sha256(model: nn.Module) -> str:
    """sha256 of the backbone's names and fp32 bytes; the pooler, which only some models of a checkpoint have, apart."""
    prefix = family_of(model.config.model_type).backbone + "."  # type: ignore[union-attr,arg-type]
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name.startswith(prefix) and not name.startswith(f"{prefix}pooler."):
            sha.update(name.encode())
            sha.update(parameter.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def check_origin(mask: Mask, called: str, name: str, sha256: str) -> None:
    """Refuse a mask that says itself that it was found in another theta_0.

    Args:
        mask: any.
        called: its file, for the message.
        name: of the model it is to be put on.
        sha256: of that model's backbone.

    Raises:
        UserError: naming both.
    """
    told = mask.provenance.get("model_sha256")
    if told is not None and told != sha256:
        raise UserError(
            f"{called} is a mask for {mask.provenance.get('model')} (weights {str(told)[:12]}), not for {name} "
            f"(weights {sha256[:12]}); type --model as in the search"
        )


def load_pretrained(name: str, *, targets: str = "paper", dropout: float | None = 0.1) -> Pretrained:
    """Load a masked language model and its tokenizer.

    Args:
        name: hub name (from the local cache where there is no network) or folder.
        targets: choice of matrices to prune; see ``families.TARGETS``.
        dropout: probability for hidden states and attention in training; None: as the checkpoint says.

    Raises:
        UserError: unknown model or family, a checkpoint without safetensors, or targets that the model lacks.
    """
    options = {} if dropout is None else dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    model, tokenizer, drawn = load_model(name, "AutoModelForMaskedLM", options, seed=0)
    family = family_of(model.config.model_type)
    if f"{family.decoder}.weight" in drawn:
        # Of a model that was exported untied and has lost its head since: a head is never trained before noise.
        model.get_submodule(family.decoder).weight = model.get_submodule(family.embedding).weight
        model.config.tie_word_embeddings = True
    if "pooler" in TARGETS[targets]:
        with loading(name):
            add_pooler(model, name)
    return Pretrained(model, tokenizer, name, not drawn, prunable(model, targets))


def load_model(name: str, auto: str, options: Mapping[str, Any], *, seed: int) -> tuple[Any, Any, list[str]]:
    """A model of transformers in fp32 on the CPU, in evaluation mode, and its tokenizer.

    Args:
        name: hub name or folder.
        auto: the class of transformers that loads it.
        options: of its configuration, put over the checkpoint's.
        seed: of what the checkpoint lacks: a head, a pooler, and nothing else of the model.

    Returns:
        The model, the tokenizer, and the names of the parameters that were drawn.

    Raises:
        UserError: unknown model or family, a checkpoint without safetensors, without all weights of the encoder or
            without a vocabulary.
    """
    transformers = quiet_transformers()
    with loading(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        family = family_of(config.model_type)
        for option, value in options.items():
            setattr(config, option, value)
        # The draw must not depend on what ran before, nor change it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = getattr(transformers, auto).from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # The encoder before the rest, so that a tied matrix has its name (XLM-R's head is made first).
    for child, module in list(model.named_children()):
        if child != family.backbone:
            delattr(model, child)
            setattr(model, child, module)
    drawn = sorted(report["missing_keys"])
    encoder, pooler = f"{family.backbone}.", f"{family.backbone}.pooler."
    if lacked := [key for key in drawn if key.startswith(encoder) and not key.startswith(pooler)]:
        raise UserError(
            f"--model {name} lacks weights of its encoder, {abbreviated(lacked)}, which would be random; type one "
            "whose model.safetensors has them under these names"
        )
    _check_vocabulary(tokenizer, config.vocab_size, name)
    model.eval()
    return model, tokenizer, drawn


def _check_vocabulary(tokenizer: Any, vocab_size: int, name: str) -> None:
    """Refuse the empty tokenizer that transformers makes where there are no files of one, and numbers without a row."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"--model {name} has no vocabulary; save its tokenizer into the same folder and type it again")
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"--model {name} has {vocab_size} rows of word embeddings for the {len(tokenizer)} tokens of its "
            "tokenizer; type one whose tokenizer is its own"
        )


def find_model(name: str) -> None:
    """Look whether `load_pretrained` would find a model, without reading or fetching its weights.

    Raises:
        UserError: unknown model or family, or a folder without safetensors.
    """
    transformers = quiet_transformers()
    with loading(name):
        family_of(transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type)
        if Path(name).is_dir() and not any(Path(name).glob("model*.safetensors")):
            raise OSError("no model.safetensors in it")


def new_pretrained(config: Mapping[str, Any], tokenizer_folder: Path, *, dropout: float, seed: int = 0) -> Pretrained:
    """A freshly drawn masked language model over a tokenizer's vocabulary (the built-in model before training).

    Args:
        config: options of the Hugging Face configuration, with ``model_type``.
        tokenizer_folder: where the tokenizer's files are.
        dropout: probability for hidden states and attention.
        seed: of the weights.
    """
    transformers = quiet_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    options = {
        **config, "vocab_size": len(tokenizer), "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(**options))
    model.eval()
    return Pretrained(model, tokenizer, "new", True, prunable(model))


def add_pooler(model: nn.Module, name: str) -> None:
    """Give a masked language model the pooler of its checkpoint, which Hugging Face leaves out, where it has one."""
    transformers = quiet_transformers()
    base, report = transformers.AutoModel.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if getattr(base, "pooler", None) is not None and not any("pooler" in key for key in report["missing_keys"]):
        getattr(model, family_of(model.config.model_type).backbone).pooler = base.pooler  # type: ignore[union-attr,arg-type]


def save_pretrained(pretrained: Pretrained, folder: Path) -> None:
    """Write a plain Hugging Face folder (config, safetensors, tokenizer), which appears whole by one rename."""
    save_folder(pretrained.model, pretrained.tokenizer, folder)


def save_folder(model: nn.Module, tokenizer: Any, folder: Path, **texts: str) -> None:
    """The same of any Hugging Face model; ``texts`` are further files, name without ``.md`` -> contents."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with _silence(), disk_full_is_user_error(folder):
            model.save_pretrained(temporary)  # type: ignore[operator]
            tokenizer.save_pretrained(temporary)
            for name, text in texts.items():
                (temporary / f"{name}.md").write_text(text, encoding="utf-8")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def quiet_transformers() -> Any:
    """The transformers library without its banners and bars, imported where it is used."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallow the libraries' progress bars and banners (loading imports deepspeed, which greets on stdout)."""
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), silent_output():
        yield


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn the loader's failures into one sentence."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise UserError(f"--model {name}: there is no such folder; type one with config.json and model.safetensors")
    try:
        with _silence():
            yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        where = "the folder" if Path(name).is_dir() else f"the hub and its cache {_hub_cache()}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {name!r} could not be loaded from {where} ({reason}); type --model with a hub name that is cached "
            "or reachable, a folder with config.json, model.safetensors and tokenizer files, or builtin"
        ) from error


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE
