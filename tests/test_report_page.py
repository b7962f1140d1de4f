"""The page of a report in a browser: Debian's chromium and chromium-driver, without a window.

EFFT_SCREENSHOTS=FOLDER keeps pictures of what the tests have seen.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import records as make
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from efft.report import publish, records

BROWSER = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), ''
)
INSTALL = 'apt-get install chromium chromium-driver'
pytestmark = pytest.mark.skipif(
  not BROWSER, reason=f'NO CHROMIUM, SO THE PAGE OF REPORTS IS NOT TESTED: {INSTALL}'
)
EVIL = '</script><script>document.title = "owned"</script><b>"bold"</b>'


@pytest.fixture(scope='module')
def content(tmp_path_factory):
  made = make.study(seeds=range(4), fractions=(0.2, 1.0))
  made += [make.record(EVIL, seed, 0.51) for seed in range(4)]
  for record in made:
    if record['task'] == 'mrpc':
      record['latency'] = [row for row in record['latency'] if row['batch'] == 1]
  made.append(make.failure('lora', 9, error=EVIL))
  return records.read(make.write(tmp_path_factory.mktemp('runs'), made))


@pytest.fixture(scope='module')
def folder(content, tmp_path_factory):
  output = tmp_path_factory.mktemp('report') / 'report'
  publish.report(content.folders[0], output, title=f'Costs {EVIL}')
  return output


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  profile = tmp_path_factory.mktemp('profile')
  for argument in (
    '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
    '--window-size=1280,1000', '--hide-scrollbars', '--disable-background-networking',
    f'--user-data-dir={profile}',
  ):  # fmt: skip
    options.add_argument(argument)
  options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
  driver = shutil.which('chromedriver')  # without it, selenium looks for one, and says if not
  started = webdriver.Chrome(options=options, service=Service(driver) if driver else None)
  yield started
  started.quit()


@pytest.fixture
def page(browser, folder):
  """The page as it is when its chart has been drawn."""
  browser.get((folder / 'index.html').as_uri())
  drawn(browser)
  return browser


def drawn(browser):
  WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, '#chart svg text'))


def keep(browser, name):
  if folder := os.environ.get('EFFT_SCREENSHOTS'):
    Path(folder).mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(Path(folder) / f'{name}.png'))


def rows(browser, table='scores-table') -> list[list[str]]:
  """The text of the rows that are shown, in their order."""
  return browser.execute_script(
    'return [...document.getElementById(arguments[0]).tBodies[0].rows]'
    '.filter(r => !r.hidden).map(r => [...r.cells].map(c => c.textContent))',
    table,
  )


def column(browser, title, table='scores-table') -> tuple[int, object]:
  """(index, header) of a column."""
  heads = browser.find_elements(By.CSS_SELECTOR, f'#{table} th')
  return next((i, h) for i, h in enumerate(heads) if h.text.split('\n')[0].startswith(title))


def texts(browser) -> set[str]:
  return set(
    browser.execute_script(
      "return [...document.querySelectorAll('#chart svg text')].map(t => t.textContent)"
    )
  )


def wait_for_text(browser, text):
  WebDriverWait(browser, 30).until(lambda b: text in texts(b))


def test_headers_sort_by_the_numbers_of_the_records(page, content):
  expected = [row['mean'] for _, row in publish.contents(content).rows.iterrows()]
  index, head = column(page, 'accuracy')
  for order, falls in (('descending', True), ('ascending', False), ('descending', True)):
    head.find_element(By.TAG_NAME, 'button').click()
    assert head.get_attribute('aria-sort') == order
    shown = [row[index] for row in rows(page)]
    assert shown == [f'{value:.4f}' for value in sorted(expected, reverse=falls)]
  keep(page, 'sorted')
  other = column(page, 'arm')[1]
  other.find_element(By.TAG_NAME, 'button').click()
  assert head.get_attribute('aria-sort') == 'none'
  names = [row[column(page, 'arm')[0]] for row in rows(page)]
  assert names == sorted(names, key=str.lower) and EVIL in names


def test_headers_sort_by_the_keyboard(page):
  index, head = column(page, 'sd')
  button = head.find_element(By.TAG_NAME, 'button')
  page.execute_script('arguments[0].focus()', button)
  assert page.switch_to.active_element == button
  button.send_keys(Keys.ENTER)
  assert head.get_attribute('aria-sort') == 'descending'
  button.send_keys(Keys.SPACE)
  assert head.get_attribute('aria-sort') == 'ascending'
  shown = [float(row[index]) for row in rows(page)]
  assert shown == sorted(shown) and len(set(shown)) > 3


def test_what_has_no_number_stays_at_the_end(page):
  index, head = column(page, 'setting')
  arm = column(page, 'arm')[0]
  for _ in range(2):
    head.find_element(By.TAG_NAME, 'button').click()
    last = rows(page)[-1]
    assert last[index] == '' and last[arm] == EVIL


def test_a_filter_keeps_the_rows_with_its_words(page):
  everything = rows(page)
  field = page.find_element(By.CSS_SELECTOR, 'input[data-table="scores-table"]')
  field.send_keys('MRPC lora')
  shown = rows(page)
  assert shown == [row for row in everything if row[0] == 'mrpc' and 'lora' in row]
  assert 0 < len(shown) < len(everything)
  found = page.find_element(By.ID, 'scores-table-found').text
  assert found == f'{len(shown)} of {len(everything)} rows'
  field.clear()
  field.send_keys('nothing has this')
  assert rows(page) == []


def test_the_chart_shows_the_cost_and_task_that_are_chosen(page, content):
  axes = {axis.name: axis for axis in publish.contents(content).axes}
  control = Select(page.find_element(By.ID, 'axis'))
  assert [option.get_attribute('value') for option in control.options] == list(axes)
  wait_for_text(page, axes['trained'].label)
  keep(page, 'light')
  control.select_by_value('latency_1x128')
  wait_for_text(page, axes['latency_1x128'].label)
  assert axes['trained'].label not in texts(page)
  assert 'pruned + int8' in texts(page), 'the fastest is of the front, and named'
  Select(page.find_element(By.ID, 'task')).select_by_value('sst2')
  page.find_element(By.ID, 'names').click()
  wait_for_text(page, 'houlsby')
  # EVIL is text of the chart, cut to what there is room for.
  assert any(text.startswith('</script>') for text in texts(page))
  points = page.find_elements(By.CSS_SELECTOR, '#chart .mark-symbol.role-mark path')
  assert len(points) == len(make.ARMS) + 1
  keep(page, 'names')


def test_what_a_task_was_not_measured_in_is_said(page):
  Select(page.find_element(By.ID, 'task')).select_by_value('mrpc')
  Select(page.find_element(By.ID, 'axis')).select_by_value('latency_8x128')
  chart = page.find_element(By.ID, 'chart')
  WebDriverWait(page, 30).until(lambda b: 'no arm was measured' in chart.text)
  Select(page.find_element(By.ID, 'task')).select_by_value('sst2')
  drawn(page)
  assert 'no arm was measured' not in chart.text


def test_text_of_records_is_text(page):
  assert page.title == f'Costs {EVIL}'
  assert page.find_element(By.TAG_NAME, 'h1').text == f'Costs {EVIL}'
  assert not page.find_elements(By.CSS_SELECTOR, 'td b, h1 b')
  assert EVIL in {row[1] for row in rows(page, 'costs-table')}
  assert rows(page, 'failed-table')[0][-1] == EVIL


def test_dark_mode_follows_the_system(page):
  def colour():
    return page.execute_script('return getComputedStyle(document.body).backgroundColor')

  light = colour()
  media = [{'name': 'prefers-color-scheme', 'value': 'dark'}]
  page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': media})
  try:
    assert (
      sum(map(int, colour()[4:-1].split(','))) < 100 < 600 < sum(map(int, light[4:-1].split(',')))
    )
    WebDriverWait(page, 30).until(
      lambda b: b.execute_script(
        "return document.querySelector('#chart svg').style.backgroundColor"
      ) not in ('', 'rgb(255, 255, 255)')
    )  # fmt: skip
    keep(page, 'dark')
  finally:
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})


def test_a_narrow_window_does_not_scroll_sideways(page):
  size = {'width': 400, 'height': 800, 'deviceScaleFactor': 1, 'mobile': False}
  page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
  try:
    page.refresh()
    drawn(page)
    assert page.execute_script('return document.documentElement.scrollWidth') <= 400
    keep(page, 'narrow')
  finally:
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_nothing_leaves_the_page_and_nothing_complains(page, folder):
  page.get_log('performance'), page.get_log('browser')
  page.refresh()
  drawn(page)
  Select(page.find_element(By.ID, 'axis')).select_by_value('seconds')
  wait_for_text(page, 'training time, s')
  events = [json.loads(entry['message'])['message'] for entry in page.get_log('performance')]
  asked = [
    event['params']['request']['url'] for event in events
    if event['method'] == 'Network.requestWillBeSent'
  ]  # fmt: skip
  assert (folder / 'index.html').as_uri() in asked, 'requests are seen'
  assert [url for url in asked if not url.startswith(('file:', 'data:'))] == []
  assert [url for url in asked if url.startswith('file:')] == [(folder / 'index.html').as_uri()]
  assert page.get_log('browser') == []
  # Not even if something in it tried.
  page.execute_script("window.tried = ''; fetch('http://127.0.0.1:9/').catch(e => tried = `${e}`)")
  WebDriverWait(page, 30).until(lambda b: b.execute_script('return window.tried'))
  assert 'Content Security Policy' in page.get_log('browser')[0]['message']
