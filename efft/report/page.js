'use strict';
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);

  // Tables: a header's button sorts, rising first for words and falling first for numbers; what has
  // no value stays at the end.
  for (const table of document.querySelectorAll('table')) {
    const body = table.tBodies[0];
    const original = new Map([...body.rows].map((row, index) => [row, index]));
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const numeric = head.classList.contains('number');
      const value = (row) => {
        const cell = row.cells[column];
        const text = numeric ? cell.dataset.value : cell.textContent;
        return text === '' ? null : numeric ? Number(text) : text;
      };
      head.querySelector('button').addEventListener('click', () => {
        const first = numeric ? 'descending' : 'ascending';
        const other = numeric ? 'ascending' : 'descending';
        const order = head.getAttribute('aria-sort') === first ? other : first;
        heads.forEach((each) => each.setAttribute('aria-sort', each === head ? order : 'none'));
        const turn = order === 'ascending' ? 1 : -1;
        const rows = [...body.rows].sort((a, b) => {
          const x = value(a), y = value(b);
          if (x === null || y === null) return (x === null) - (y === null);
          const compared = numeric ? x - y : x.localeCompare(y, 'en', { numeric: true });
          return turn * compared || original.get(a) - original.get(b);
        });
        body.append(...rows);
      });
    });
  }

  // A row is shown that has all words of the filter.
  for (const input of document.querySelectorAll('input[data-table]')) {
    const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
    const found = document.getElementById(`${input.dataset.table}-found`);
    input.addEventListener('input', () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join('\n').toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      found.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
    });
  }

  if (!window.vegaEmbed) return;
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const config = () => data.config[dark.matches ? 'dark' : 'light'];
  const options = {
    renderer: 'svg', ast: true, // without eval, which the page's policy forbids
    actions: { export: true, source: false, compiled: false, editor: false },
    tooltip: { theme: 'custom' },
  };
  const show = (element, spec) => vegaEmbed(element, { ...spec, config: config() }, {
    ...options, tooltip: { theme: dark.matches ? 'dark' : 'light' },
  }).catch((error) => { element.textContent = `The chart failed: ${error.message}`; throw error; });

  const [task, axis, names] = ['task', 'axis', 'names'].map((id) => document.getElementById(id));

  // The layers are written once, in Python, and get their titles, scale and paper here.
  function filled(value, chosen, title) {
    if (Array.isArray(value)) return value.map((item) => filled(item, chosen, title));
    if (value === 'X') return chosen.label;
    if (value === 'Y') return title;
    if (value === 'PAPER') return config().background;
    if (value === null || typeof value !== 'object') return value;
    const copy = {};
    for (const [key, item] of Object.entries(value)) copy[key] = filled(item, chosen, title);
    if (copy.field === 'x' && copy.scale) {
      const linear = chosen.scale === 'linear';
      copy.scale = { type: chosen.scale, padding: copy.scale.padding, nice: linear };
      if (linear) copy.scale.zero = false;
      if (chosen.ticks) copy.axis = { format: '~s', labelOverlap: true, values: chosen.ticks };
    }
    return copy;
  }

  function draw() {
    const chosen = data.axes.find((each) => each.name === axis.value);
    const some = data.points.filter((p) => p.task === task.value && p.axis === axis.value);
    if (!some.length) {
      document.getElementById('chart').textContent = 'Of this task no arm was measured in that.';
      return;
    }
    // A name that found no room is shown all the same when every name is asked for.
    const values = names.checked ? some.map((p) => (p.dx ? p : { ...p, dx: 7, dy: -9 })) : some;
    const layers = filled(data.layers, chosen, data.metrics[task.value]);
    layers[2].params = [
      // Scrolling alone moves the page, as everywhere.
      { name: 'view', select: { type: 'interval', zoom: 'wheel![event.shiftKey]' }, bind: 'scales' },
      { name: 'standing', select: { type: 'point', fields: ['label'] }, bind: 'legend' },
    ];
    layers[2].encoding.opacity = { condition: { param: 'standing', value: 1 }, value: 0.12 };
    show(document.getElementById('chart'), {
      width: 'container', height: 380, data: { values }, layer: layers,
      autosize: { type: 'fit', contains: 'padding' }, padding: 8,
    });
  }

  function drawAll() {
    if (task) draw();
    data.extra.forEach((spec, number) => {
      show(document.getElementById(`extra-${number}`), { ...spec, title: undefined });
    });
  }

  if (task) for (const control of [task, axis, names]) control.addEventListener('change', draw);
  dark.addEventListener('change', drawAll);
  drawAll();
})();
