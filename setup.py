"Packaging; every value lives in settings.ini."
from configparser import ConfigParser
from pathlib import Path

import setuptools

config = ConfigParser(delimiters=['='])
config.read('settings.ini')
cfg = config['DEFAULT']
lib, readme = cfg['lib_path'], Path('README.md')

setuptools.setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    classifiers=['Development Status :: 3 - Alpha', 'Programming Language :: Python :: 3'],
    packages=setuptools.find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['embedded/*', 'widgets/*.js', 'widgets/*.css']}, include_package_data=True, zip_safe=False,
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('run', 'lab', 'sweep', 'docs', 'test', 'dev')},
    python_requires=f">={cfg['min_python']}",
    long_description=readme.read_text() if readme.exists() else '', long_description_content_type='text/markdown',
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']})
