"Every method of N:M training inside the real Hugging Face Trainer, Lightning and accelerate: the bits of a plain loop, and in the Trainer of a run that was resumed."
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_nm_ranks import METHODS, STEPS
from torch import Tensor, nn

from sparse_workbench import recipes
from sparse_workbench.hosts import bare_optimizer, hf_callback, lightning_callback
from sparse_workbench.sparsifier import Sparsifier
from sparse_workbench.testing import assert_same, mlp, seeded, snapshot

with seeded(0): DATA = torch.randn(4 * STEPS, 16)


class Net(nn.Module):
    "A small model that knows its loss, remembers its batches, and makes the samples of a step those of its number."
    def __init__(self, surgery: Callable[[nn.Module], object]):
        super().__init__()
        self.net, self.seen = mlp((16, 32, 8)), list[Tensor]()
        surgery(self.net)
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(len(self.seen))
        self.seen.append(x)
        return dict(loss=(self.net(x) - x[:, :8].sin()).square().mean())


def made(name: str) -> tuple[Net, torch.optim.Optimizer, Callable[[torch.optim.Optimizer], Sparsifier]]:
    "Model, optimizer, and what a callback takes."
    how = dict(recipe=name, make=torch.optim.AdamW, surgery=lambda m: None) | METHODS[name]
    model = Net(how.pop('surgery'))
    opt = how.pop('make')(model.parameters(), 1e-2)
    return model, opt, partial(recipes.REGISTER[how.pop('recipe')]['recipe'], model.net, total_steps=STEPS, **how)


def check(name: str, model: Net, opt: torch.optim.Optimizer, sp: Sparsifier) -> None:
    "The same batches in a plain loop end with the same weights, masks and dense weights; and what was asked is zero."
    assert len(model.seen) == sp.t == STEPS
    plain, own, how = made(name)
    again = how(own)
    for x in model.seen:
        plain(x)['loss'].backward()
        own.step()
        own.zero_grad()
    assert_same(snapshot((model.net, opt, sp, None)), snapshot((plain.net, own, again, None)))
    end = 0. if name == 'masked_decay' else .75 if METHODS[name].get('pattern') == '1:4' else .5
    for s in sp.sites: assert not s.weight[~s.mask].any() and abs(float((s.weight == 0).float().mean()) - end) < .01, s.name


@pytest.mark.xdist_group('transformers')
@pytest.mark.parametrize('name', METHODS)
def test_trainer(name, tmp_path):
    "To the end, and from half way."
    from transformers import Trainer, TrainingArguments
    args = TrainingArguments(str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, lr_scheduler_type='constant', max_grad_norm=0., use_cpu=True, report_to=[],
                             disable_tqdm=True, logging_strategy='no', save_steps=STEPS // 2, save_total_limit=2, remove_unused_columns=False)
    def trained(seen: list[Tensor], **how) -> tuple[Net, torch.optim.Optimizer, Sparsifier]:
        model, opt, attach = made(name)
        model.seen = seen
        Trainer(model, args, train_dataset=[dict(x=x) for x in DATA], callbacks=[callback := hf_callback(attach)], optimizers=(opt, None)).train(**how)
        return model, opt, callback.sparsifier
    model, opt, sp = trained([])
    check(name, model, opt, sp)
    again, _, resumed = trained(model.seen[:STEPS // 2], resume_from_checkpoint=str(tmp_path / f'checkpoint-{STEPS // 2}'))
    assert_same(dict(enumerate(model.seen)), dict(enumerate(again.seen)))
    assert_same(snapshot((model.net, opt, sp, None)), snapshot((again.net, None, resumed, None)))


@pytest.mark.xdist_group('lightning')
@pytest.mark.parametrize('name', METHODS)
def test_lightning(name, tmp_path):
    import lightning.pytorch as L
    model, opt, how = made(name)
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
        def training_step(self, batch, i): return self.model(batch)['loss']
        def configure_optimizers(self): return opt
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        L.Trainer(max_epochs=1, accelerator='cpu', callbacks=[callback := lightning_callback(how)], logger=False, enable_progress_bar=False, enable_model_summary=False,
                  enable_checkpointing=False, default_root_dir=tmp_path).fit(Module(), torch.utils.data.DataLoader(DATA, batch_size=4))
    check(name, model, opt, callback.sparsifier)


@pytest.mark.xdist_group('transformers')
@pytest.mark.parametrize('name', METHODS)
def test_accelerate(name):
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model, opt, how = made(name)
    net, wrapped, data = accelerator.prepare(model, opt, torch.utils.data.DataLoader(DATA, batch_size=4))
    sp = how(bare_optimizer(wrapped))
    for x in data:
        accelerator.backward(net(x)['loss'])
        wrapped.step()
        wrapped.zero_grad()
    check(name, model, opt, sp)
