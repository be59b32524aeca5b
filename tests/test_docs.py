"The documentation site builds without the network, is complete and whole, and looks right in a browser."
from __future__ import annotations
import ast, functools, http.server, json, posixpath, re, shutil, subprocess, sys, threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
GROUPS = {'Tutorials': 'tutorials', 'Baselines': 'baselines'}
PARTS = sorted(p for p in NBS.iterdir() if p.is_dir() and p.name[0].isdigit())
CHROMIUM = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage']


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The built site."
    folder = tmp_path_factory.mktemp('site')
    cmd = [sys.executable, 'docs/build.py', '--out', folder/'html', '--work', folder/'sources']
    done = subprocess.run(cmd, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder/'html'


def squeezed(text: str) -> str: return re.sub(r'\s+', '', text)


@dataclass
class Page:
    "What the tests look at in a page; parsed, all pages would take a gigabyte."
    file: Path
    ids: set[str]
    links: set[str]
    loaded: list[str] # what the page makes a browser ask for
    text: str # of its article, without white space

    @property
    def soup(self) -> BeautifulSoup: return parsed(self.file)


@functools.lru_cache(maxsize=2)         # the index of the reference, and a page of it
def parsed(file: Path) -> BeautifulSoup: return BeautifulSoup(file.read_text(encoding='utf-8'), 'html.parser')


LOADED = ', '.join(['[src]', *(f'link[rel~={kind}]' for kind in ('stylesheet', 'icon', 'preload'))])

def read_page(file: Path) -> Page:
    soup = parsed(file)
    article = soup.select_one('article')
    return Page(file, {t['id'] for t in soup.select('[id]')}, {a['href'] for a in soup.select('a[href]')},
                [t.get('src') or t.get('href') for t in soup.select(LOADED)],
                squeezed(article.get_text()) if article else '')


@pytest.fixture(scope='module')
def pages(site: Path) -> dict[str, Page]:
    "Every page by its path in the site."
    files = sorted(p for p in site.rglob('*.html') if '_static' not in p.parts)
    return {p.relative_to(site).as_posix(): read_page(p) for p in files}


def page_of(notebook: Path) -> str:
    "A notebook's page: folders and names without their numbers."
    steps = notebook.relative_to(NBS).with_suffix('.html').parts
    return '/'.join(re.sub(r'^\d+\w*?_', '', step.lower()) for step in steps)


def notebooks() -> list[Path]:
    return sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def modules() -> list[str]:
    files = [p.relative_to(ROOT/'mwt') for p in (ROOT/'mwt').rglob('*.py') if p.name[0] != '_']
    return sorted('.'.join(p.with_suffix('').parts) for p in files)


def names(module: str) -> tuple[list[str], list[str]]:
    "The public names of a module, nbdev's list on top of the file; the functions and classes beside them."
    text = (ROOT/'mwt'/f"{module.replace('.', '/')}.py").read_text(encoding='utf-8')
    listed = re.search(r'^__all__ = (\[.*?\])', text, flags=re.M | re.S)
    made = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    patches = [n for n in made if any(ast.unparse(d).startswith('patch') for d in n.decorator_list)]
    own = [n.name for n in made if n.name[0] != '_' and n not in patches]
    public = ast.literal_eval(listed[1])
    return public, [name for name in dict.fromkeys(own) if name not in public]


# The files

@pytest.mark.parametrize('module', modules())
def test_every_public_symbol_is_in_the_reference(module: str, pages: dict[str, Page]) -> None:
    public, internal = names(module)
    if not public + internal: return
    reference = pages[f'reference/{module}.html'].soup
    heads = [h for h in reference.select('section > :is(h2, h3)') if h.code]
    entries = {h.code.get_text(): h.find_parent('section') for h in heads}
    listed = {a.get_text() for a in pages['reference/index.html'].soup.select('table a')}
    assert not {*public, *internal} - entries.keys()
    assert not {*public, *internal} - listed
    for name in public + internal:
        assert entries[name].get('id'), f'{name} has no anchor'
        assert entries[name].select_one('div.highlight'), f'{name} has no signature'
        link = entries[name].select_one('p.where a')
        assert link and '#' in link['href'], f'{name} does not link to its chapter'


@pytest.mark.parametrize('module', modules())
def test_public_names_come_first_in_the_reference(module: str, pages: dict[str, Page]) -> None:
    public, internal = names(module)
    if not public or not internal: return
    heads = pages[f'reference/{module}.html'].soup.select('section > :is(h2, h3)')
    order = [h.code.get_text() for h in heads if h.code]
    assert max(map(order.index, public)) < min(map(order.index, internal))


def test_chapters_stand_in_reading_order(pages: dict[str, Page]) -> None:
    tree = pages['index.html'].soup.select_one('.sidebar-tree')
    captions = tree.select('p.caption')
    shown = {c.get_text(): [a['href'] for a in c.find_next('ul').select('a.internal')] for c in captions}
    groups = {'Chapters': chapters()} | {c: in_folder(NBS/folder) for c, folder in GROUPS.items()}
    for caption, expected in groups.items():
        assert shown.get(caption, []) == expected
        assert not set(expected) - pages.keys()
    assert list(shown) == [c for c in (*groups, 'API reference') if c in shown]


def in_folder(folder: Path) -> list[str]:
    return [page_of(p) for p in sorted(folder.glob('*.ipynb')) if p.name != 'index.ipynb']


def chapters() -> list[str]:
    "The pages of all parts, each after the page that says what it is about; then the chapters beside them."
    found = []
    for part in PARTS:
        about = page_of(part/'00_about.ipynb') # made by docs/build.py where there is no notebook
        found += [about, *(page for page in in_folder(part) if page != about)]
    return found + in_folder(NBS)


def test_exported_code_is_shown_and_hidden_cells_are_not(pages: dict[str, Page]) -> None:
    for path in notebooks():
        if path.name == 'index.ipynb': continue
        text = pages[page_of(path)].text
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            code = ''.join(cell['source'])
            body = squeezed(re.sub(r'^#\|.*$', '', code, flags=re.M))
            if cell['cell_type'] != 'code' or not body: continue
            exported = re.match(r'#\|\s*export[si]?\s*$', code, flags=re.M)
            hidden = re.match(r'#\|\s*hide\s*$', code, flags=re.M) and len(body) > 60
            assert not exported or body in text, f'{path.name} does not show\n{code}'
            assert not hidden or body not in text, f'{path.name} shows\n{code}'


def test_no_dead_link(site: Path, pages: dict[str, Page]) -> None:
    dead = []
    for name, page in pages.items():
        for href in page.links:
            if urlparse(href).scheme or href.startswith('//'): continue
            target, fragment = urldefrag(href)
            path = posixpath.join(posixpath.dirname(name), unquote(target))
            file = posixpath.normpath(path) if target else name
            if file in pages: found = not fragment or unquote(fragment) in pages[file].ids
            else: found = not fragment and (site/file).is_file()
            if not found: dead.append(f'{name}: {href}')
    assert not dead


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    far = re.compile(r'^(?:https?:)?//')
    for name, page in pages.items():
        assert not [u for u in page.loaded if far.match(u)], name
        near = [u for u in page.loaded if not u.startswith('data:')]
        assert not [u for u in near if not (page.file.parent/urlparse(u).path).is_file()], name
    for css in site.rglob('*.css'):
        text = css.read_text(encoding='utf-8')
        assert not re.search(r'(?:url\(|@import)\s*["\']?(?:https?:)?//', text), css


# In a browser

@pytest.fixture(scope='module')
def address(site: Path) -> Iterator[str]:
    "The site, served on the loopback interface."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if not (CHROMIUM and DRIVER): pytest.skip('needs chromium and chromedriver')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]: options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(30)
    driver.get('about:blank')
    driver.get_log('browser')
    yield driver
    driver.quit()


def resize(browser, width: int) -> None:
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)


def complaints(browser, address: str) -> list[str]:
    "What went wrong since the last call: console errors, failed requests, requests to other places."
    found = [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE']
    asked: dict[str, str] = {} # the browser's own pages make requests too; only those of ours count
    for entry in browser.get_log('performance'):
        event = json.loads(entry['message'])['message']
        kind, said = event['method'], event['params']
        if kind == 'Network.requestWillBeSent' and said['documentURL'].startswith(address):
            asked[said['requestId']] = url = said['request']['url']
            if not url.startswith((address, 'data:', 'blob:')): found.append(f'asks for {url}')
        if said.get('requestId') not in asked: continue
        url = asked[said['requestId']]
        if kind == 'Network.responseReceived' and said['response']['status'] >= 400: found.append(f'no {url}')
        failed = kind == 'Network.loadingFailed' and not said.get('canceled')
        if failed: found.append(f"{said['errorText']}: {url}")
    return found


# Waits for MathJax where a page has formulas, then reports what is not as it should be.
LOOK = '''
const [width, done] = arguments;
const started = () => new Promise(resolve => {
  const since = Date.now();
  const timer = setInterval(() => {
    if (!window.MathJax?.startup?.promise && Date.now() - since < 10000) return;
    clearInterval(timer);
    resolve(window.MathJax?.startup?.promise);
  }, 10);
});
const ready = document.querySelector('.math') ? started() : Promise.resolve();
ready.then(() => {
  const page = document.documentElement, content = document.querySelector('.content'), wrong = [];
  if (page.scrollWidth > width) wrong.push(`page is ${page.scrollWidth} wide in a window of ${width}`);
  if (content.scrollWidth > content.clientWidth) {
    const edge = content.getBoundingClientRect().right;
    const wide = [...content.querySelectorAll('*')].find(e => e.getBoundingClientRect().right > edge + 1);
    wrong.push(`${content.scrollWidth} wide in ${content.clientWidth}: ${wide?.outerHTML.slice(0, 200)}`);
  }
  for (const m of document.querySelectorAll('.math'))
    if (!m.querySelector('mjx-container')) wrong.push(`not typeset: ${m.textContent}`);
  for (const m of document.querySelectorAll('mjx-merror, [data-mjx-error]'))
    wrong.push(`formula with an error: ${m.textContent}`);
  for (const i of document.querySelectorAll('article img'))
    if (!i.complete || !i.naturalWidth) wrong.push(`no picture: ${i.src}`);
  if (width >= 1440) for (const p of document.querySelectorAll('div.cell_input pre'))
    if (p.offsetParent && p.scrollWidth > p.clientWidth)
      wrong.push(`code scrolls sideways: ${p.textContent.slice(0, 200)}`);
  done(wrong);
});
'''


WIDTHS = 1440, 1100, 390        # of a window: a desk, a small desk, a phone


@pytest.mark.parametrize('all_widths', [False, pytest.param(True, marks=pytest.mark.slow)],
                         ids=['a third of them', 'each in each window'])
def test_every_page_looks_right(all_widths: bool, pages: dict[str, Page], address: str, browser) -> None:
    wrong = {}
    for place, width in enumerate(WIDTHS):
        resize(browser, width)
        for page in list(pages) if all_widths else list(pages)[3 * place::9]:
            browser.get(f'{address}/{page}')
            found = browser.execute_async_script(LOOK, width) + complaints(browser, address)
            if found: wrong[f'{page} at {width}'] = found
    assert not wrong, json.dumps(wrong, indent=1)


def test_search_finds(address: str, browser) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    resize(browser, 1440)
    browser.get(f'{address}/search.html?q=kernel')
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, '#search-results li a'))
    assert not complaints(browser, address)


def test_dark_mode_and_copy_buttons(address: str, browser) -> None:
    from selenium.webdriver.common.by import By
    resize(browser, 1440)
    browser.get(f'{address}/core/checks.html')
    background = "return getComputedStyle(document.body).backgroundColor"
    colours = []
    for theme in ('light', 'dark'):
        browser.execute_script(f"document.body.dataset.theme = '{theme}'")
        colours.append(browser.execute_script(background))
    assert colours[0] != colours[1]
    assert browser.find_elements(By.CSS_SELECTOR, 'div.highlight button.copybtn')
