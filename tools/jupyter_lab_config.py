"What `make lab` sets: notebooks are saved clean and with figures, no news or update pop-ups."
import os
import sys
from pathlib import Path

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

here = Path(__file__).resolve().parent
c = get_config()  # noqa: F821 (given by Jupyter)
VIEW = 'application/vnd.jupyter.widget-view+json'


def outputs(notebook):
    "Every output of rich data, with the place where it stands."
    return [((cell.get('id'), i), o['data']) for cell in notebook['cells'] for i, o in enumerate(cell.get('outputs', [])) if 'data' in o]


class Notebooks(AsyncLargeFileManager):
    """A saved notebook holds the static twin of a widget and no reference to a kernel, so that it shows figures everywhere.
    A page that opens it while the kernel still lives is given the references back, and its widgets come alive."""
    def __init__(self, **kw):
        super().__init__(**kw)
        self.views = {}     # path -> place -> the reference
        self.born = {}      # id of a widget -> process of the kernel that made it

    async def process(self, path):
        "The process of the kernel that works on a notebook."
        for s in await self.parent.session_manager.list_sessions():
            if s['path'] == path and s.get('kernel'): return self.parent.kernel_manager.get_kernel(s['kernel']['id']).provisioner.pid
        return None

    async def save(self, model, path=''):
        if model.get('type') == 'notebook' and model.get('content'):
            pid, views = await self.process(path.strip('/')), {}
            for place, data in outputs(model['content']):
                if VIEW in data and 'text/html' in data: views[place] = data.pop(VIEW)
            for v in views.values(): self.born.setdefault(v['model_id'], pid)
            self.views[path.strip('/')] = views
        return await super().save(model, path)

    async def get(self, path, content=True, *args, **kw):
        model = await super().get(path, content, *args, **kw)
        views = self.views.get(path.strip('/'))
        if views and model['type'] == 'notebook' and model['content'] and (pid := await self.process(path.strip('/'))):
            for place, data in outputs(model['content']):
                if place in views and self.born[views[place]['model_id']] == pid: data[VIEW] = views[place]
        return model


def save_clean(model, path, **_):
    "Keep outputs; drop what changes with every run, and the widgets' state (they have a static twin)."
    if model['type'] != 'notebook' or model['content']['nbformat'] != 4: return
    from nbdev.clean import clean_nb
    clean_nb(model['content'], allowed_cell_metadata_keys=['tags', 'trusted'])
    model['content']['metadata'].pop('widgets', None)


c.ServerApp.contents_manager_class = Notebooks
c.ContentsManager.pre_save_hook = save_clean
c.LabApp.app_settings_dir = str(here / 'lab_settings')
c.LabApp.extension_manager = 'readonly'
c.ServerApp.root_dir = str(here.parent)
c.ServerApp.allow_root = True     # as in most containers; the server listens on this machine only
os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
