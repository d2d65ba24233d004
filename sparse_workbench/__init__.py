"A workbench for neural-network sparsity: sites, criteria, patterns, allocations, schedules, rules, flows, curves, runs."
__version__ = "0.1.0"

import torch as _torch

from . import recipes, zoo
from .accounting import Account, account
from .allocation import borrow, er, erk, erk_plus, explicit, global_, lamp, owl, redistribute, uniform, uniform_plus
from .core import Report, Site, sites
from .curves import Curve, essential_sparsity, sensitivity
from .deploy import Advice, Deployment, advise, export
from .evaluate import Evaluate, accuracy, evaluation, perplexity
from .execute import run, sweep
from .flows import Flow, adam_l1, cut, dense, dense_momentum, explore, group_lasso, l1, mask_decay, mvue, s_ste, soft, sr_ste, ste
from .formats import from_torch_prune, load_sparse, masks_from_zeros, save_sparse
from .kernels import cpu as _cpu
from .kernels.linear import Packed, SparseLinear, pack, sparse_linear, unpack
from .loop import fit
from .gradient_flow import GradientFlow
from .oneshot import prune
from .optimizers import MaskedAdam, StepAdam
from .patterns import Pattern, block, channel, col, head, nm, pattern, per_row, row, transposable, unstructured
from .rules import drop_grow, exploration, explored, forgetting, given, keep_best, rewire, shrinking, two_sets
from .runs import results
from .schedules import acdc_phases, constant, cosine, cosine_fraction, cubic, cyclic, death_rate, every, geometric, halving, journey, linear, once, steps
from .scores import chance, criterion, fisher, gradient, grasp, magnitude, momentum, movement, noise, random, ria, saliency, synflow, taylor, wanda
from .sparsifier import Sparsifier, record
from .stats import Calibration, class_loss, collect, next_token_loss

if _torch.cuda.is_available(): from .kernels import hopper as _hopper, nm as _nm, semi_structured as _semi, sweep as _sweep, threshold as _threshold, transposable as _transposable  # their kernels take over on a GPU
