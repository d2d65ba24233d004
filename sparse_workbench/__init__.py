"A workbench for neural-network sparsity: sites, criteria, patterns, allocations, schedules, rules, flows, curves, runs."
__version__ = "0.1.0"

import torch as _torch

from . import recipes, zoo
from .allocation import er, erk, explicit, global_, lamp, owl, uniform
from .core import Report, Site, sites
from .curves import Curve, essential_sparsity, sensitivity
from .evaluate import Evaluate, accuracy, evaluation, perplexity
from .execute import run
from .flows import cut, sr_ste, ste
from .formats import load_sparse, save_sparse
from .oneshot import prune
from .patterns import Pattern, block, channel, col, head, nm, pattern, per_row, row, unstructured
from .rules import keep_best
from .runs import results
from .schedules import constant, cosine, cubic, cyclic, every, geometric, linear, once, steps
from .scores import criterion, fisher, gradient, grasp, magnitude, movement, noise, random, ria, saliency, synflow, taylor, wanda
from .sparsifier import Sparsifier
from .stats import Calibration, class_loss, collect, next_token_loss

if _torch.cuda.is_available(): from .kernels import nm as _nm  # its kernels take over on a GPU
