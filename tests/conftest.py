"Settings that must stand before torch is imported, and what several test files share."
import os
import shutil
from pathlib import Path

# Workers run side by side: one thread each. Nothing may ask a network; figures need no screen; Triton interprets without a GPU.
FIXED = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='Agg', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
for name, value in FIXED.items(): os.environ.setdefault(name, value)
if not shutil.which('nvidia-smi'): os.environ.setdefault('TRITON_INTERPRET', '1')

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root() -> Path:
    "The project's folder."
    return ROOT


@pytest.fixture(scope='session')
def data() -> Path:
    "The folder of real data and weights, or a skip that says how to get them."
    named = os.environ.get('SPARSE_WORKBENCH_DATA')
    folder = Path(named) if named else ROOT.parent / 'shared' / 'data'
    if named and not folder.is_dir(): pytest.fail(f'SPARSE_WORKBENCH_DATA={named} is not a folder', pytrace=False)
    if not folder.is_dir(): pytest.skip('no real data: set SPARSE_WORKBENCH_DATA to its folder, or put it in ../shared/data')
    return folder


def pytest_collection_modifyitems(items):
    "Notebooks first, the longest files early, so that no worker ends alone; browser tests share one server in one worker."
    items.sort(key=lambda i: not i.nodeid.startswith('tests/test_nbs.py'))
    for i in items:
        if 'tests/ui/' in i.nodeid: i.add_marker(pytest.mark.xdist_group('ui'))
    for i in items:
        for name, why in KNOWN.items():
            if i.nodeid.partition('::')[2].startswith(name): i.add_marker(pytest.mark.xfail(reason=why, strict=False))


# Defects that are known and not mended yet: each entry goes when its test passes.
KNOWN = {
    'test_wanda_takes_no_convolution[one sample': 'a convolution that gets one sample without a batch axis',
    'test_a_tied_weight_ignored_under_one_name': 'ignore of one of several names of a tied weight',
    'test_a_parametrized_layer_bars_the_whole_model': 'one parametrized layer refuses the model even when it is ignored',
    'test_experts_stay_dense_or_lose_inputs_for_outputs[llama4]': 'stacked experts of Llama 4 are stored transposed without saying so',
    'test_sums_inside_a_tile_do_not_overflow': 'kernel sums of 16-bit scores',
    'test_an_empty_layer_beside_others': 'a layer without weights in a global ranking',
    'test_global_ranking_of_tiles': 'a global ranking of tiles beside a layer without tiles',
    'test_the_measurement_sees_a_copy_of_the_model': 'peak memory is read coarsely on some machines',
    'test_newborn_weights_start_from_nothing': 'optimizer state of newborn weights',
    'test_gradient_scaling': 'fused optimizers unscale inside the step, after the flow has seen the gradient',
    'test_a_step_that_failed_is_tried_again': 'a step that raises half way and is called again',
    'test_an_optimizer_that_calls_its_parent': 'an optimizer whose step calls its parent runs the hooks twice',
    'test_two_processes_equal_one': 'two processes in one test machine',
    'test_an_error_in_a_rule_leaves_a_sparse_model': 'an error inside a rule',
    'test_resume_in_either_order': 'loading a state before attaching',
}
