"Sphinx's settings for the site that `docs/build.py` makes."
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

_parser = ConfigParser(delimiters=['='])
_parser.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
_settings = _parser['DEFAULT']

project, author, copyright = _settings['title'], _settings['author'], _settings['copyright']
version = release = _settings['version']
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton']
exclude_patterns = ['notebooks/**']  # downloads, not pages
suppress_warnings = ['mystnb.unknown_mime_type']  # notebook widgets have a text form beside them

# The outputs stored in the notebooks are shown; the tests have run them already.
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['attrs_block', 'attrs_inline', 'colon_fence', 'deflist', 'dollarmath', 'amsmath']
myst_heading_anchors = 4
myst_ref_domains = ['std']          # links lead to pages and labels, never to symbols of C or C++

# A fully local MathJax: `setup` copies this one file out of the package sphinx-mathjax-offline.
_mathjax_file = Path(find_spec('sphinx-mathjax-offline').origin).parent/'static'/'mathjax'/'tex-svg.js'
mathjax_path = 'tex-svg.js'
mathjax3_config = {'svg': {'scale': 0.95}, 'options': {'enableMenu': False}}

html_theme = 'furo'
html_title = project
html_static_path = ['static']
html_css_files = ['mwt.css']
html_favicon = 'static/favicon.svg'
html_show_sourcelink = html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = 'xcode', 'github-dark'
copybutton_selector = 'div.highlight pre'
copybutton_exclude = '.linenos, .gp'
_code_font = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace'
html_theme_options = {
    'light_css_variables': {
        'color-brand-primary': '#0b5c8a', 'color-brand-content': '#0b5c8a', 'color-brand-visited': '#0b5c8a',
        'font-stack--monospace': _code_font},
    'dark_css_variables': {
        'color-brand-primary': '#6cb8e6', 'color-brand-content': '#6cb8e6', 'color-brand-visited': '#6cb8e6'},
}


def titles_alone(app, pagename, templatename, context, doctree):
    """The sidebar shows the titles of pages, and the modules of the reference on its own pages only.

    What is left out is left out before it is copied for each page: that halves the time of a page."""
    whole, metadata = context.get('toctree'), app.env.metadata
    if whole is None: return
    leaves = [page for page in app.env.found_docs if page not in app.env.toctree_includes]
    if not pagename.startswith('reference/'): leaves.append('reference/index')

    def toctree(**options):
        for page in leaves: metadata[page]['tocdepth'] = 1
        try: return whole(**options)
        finally:
            for page in leaves: del metadata[page]['tocdepth']

    context['toctree'] = toctree


def setup(app):
    "One file of MathJax instead of the 15 MB that the package holds."
    from sphinx.util.fileutil import copy_asset
    app.connect('html-page-context', titles_alone, priority=400)        # before the theme makes its sidebar
    app.connect('build-finished', lambda app, error: error or copy_asset(_mathjax_file, app.outdir/'_static'))
