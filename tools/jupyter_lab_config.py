"What `make lab` sets: notebooks are saved clean, and no news or update pop-ups."
import os
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
c = get_config()  # noqa: F821 (given by Jupyter)


def save_clean(model, path, **_):
    "Keep outputs; drop what changes with every run, and the widgets' state (they have a static twin)."
    if model['type'] != 'notebook' or model['content']['nbformat'] != 4: return
    from nbdev.clean import clean_nb
    clean_nb(model['content'], allowed_cell_metadata_keys=['tags'])
    model['content']['metadata'].pop('widgets', None)


c.ContentsManager.pre_save_hook = save_clean
c.LabApp.app_settings_dir = str(here / 'lab_settings')
c.LabApp.extension_manager = 'readonly'
c.ServerApp.root_dir = str(here.parent)
c.ServerApp.allow_root = True     # as in most containers; the server listens on this machine only
os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
