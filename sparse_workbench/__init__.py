"A workbench for neural-network sparsity: sites, criteria, patterns, allocations, schedules, rules, flows, curves, runs."
__version__ = "0.1.0"

import torch as _torch

from . import recipes, zoo
from .allocation import borrow, er, erk, erk_plus, explicit, global_, lamp, owl, redistribute, uniform, uniform_plus
from .core import Report, Site, sites
from .curves import Curve, essential_sparsity, sensitivity
from .evaluate import Evaluate, accuracy, evaluation, perplexity
from .execute import run
from .flows import Flow, cut, dense_momentum, explore, l1, soft, sr_ste, ste
from .formats import load_sparse, save_sparse
from .loop import fit
from .oneshot import prune
from .patterns import Pattern, block, channel, col, head, nm, pattern, per_row, row, unstructured
from .rules import drop_grow, exploration, explored, forgetting, given, keep_best, rewire, shrinking, two_sets
from .runs import results
from .schedules import acdc_phases, constant, cosine, cosine_fraction, cubic, cyclic, death_rate, every, geometric, journey, linear, once, steps
from .scores import chance, criterion, fisher, gradient, grasp, magnitude, momentum, movement, noise, random, ria, saliency, synflow, taylor, wanda
from .sparsifier import Sparsifier, record
from .stats import Calibration, class_loss, collect, next_token_loss

if _torch.cuda.is_available(): from .kernels import nm as _nm  # its kernels take over on a GPU
