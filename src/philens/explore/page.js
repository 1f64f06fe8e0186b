// Runs in Gradio's HTML component: `element` is its root, `trigger` sends events, `watch` tells of new markup.
const tip = document.createElement('div');
tip.className = 'ph-tip';
tip.setAttribute('role', 'tooltip');
tip.hidden = true;
document.body.append(tip);
let sections = [];
let anchor = null;
let pressed = false;
let marking = 0;
let loaded = false;
let highlighted = '';
let pinned = null; // the token whose values stay, with what can be done there
const live = typeof recorded === 'undefined'; // a recorded page has no model

// A pane is a list of options, its tokens: it has the keyboard's focus, and one of its tokens is the active one.
function setUp() {
  unpin();
  hide();
  anchor = null;
  highlighted = '';
  sections = [...element.querySelectorAll('.reading')].map((root, text) => {
    const section = {root, text, panes: [], values: JSON.parse(root.dataset.values),
      others: JSON.parse(root.dataset.others)};
    for (const pane of root.querySelectorAll('.text')) {
      const tokens = [...pane.children];
      Object.assign(pane, {section, tokens, active: 0, tabIndex: 0});
      tokens.forEach((token, number) => {
        Object.assign(token, {section, number, pane});
        token.setAttribute('role', 'option');
        token.setAttribute('aria-selected', 'false');
      });
      section.panes.push(pane);
    }
    return section;
  });
}

// The values of a token, in words.
function lines({section, number}) {
  return Object.entries(section.values).map(([name, values]) => [name, values[number]])
    .map(([name, value]) => [name, value === null ? 'none' : value.toFixed(3)]);
}

const make = (tag, text, name) => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
};
const percent = (p) => p < .001 ? '<0.1 %' : `${(100 * p).toFixed(p < .0995 ? 1 : 0)} %`;

function show(token, box) {
  const piece = token.textContent.replace(/\n$/, '');
  const list = make('dl', '');
  for (const [name, value] of lines(token)) list.append(make('dt', name), make('dd', value));
  tip.replaceChildren(make('b', `token ${token.number}  ${piece}`), list, ...alternatives(token));
  tip.hidden = false;
  put(token, box);
  point(token);
}

// Beside the token, or beside the place given.
function put(token, box) {
  const at = box || token.getClientRects()[0] || token.getBoundingClientRect();
  const {offsetWidth: width, offsetHeight: height} = tip;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - width - 8))}px`;
  const above = at.top - height - 8;
  tip.style.top = `${Math.max(4, above > 4 ? above : Math.min(at.bottom + 8, innerHeight - height - 4))}px`;
}

// The likeliest tokens in a token's place; of a pinned one, each can be put there.
function alternatives(token) {
  const {ranks = [], tokens = [], of} = token.section.others, own = pinned === token;
  const found = [], rank = ranks[token.number];
  if (rank) {
    found.push(make('p', `rank ${rank.toLocaleString('en')} by ${of}; likeliest:`, 'rank'));
    const list = make('ol', '');
    tokens[token.number].forEach(([text, p], number) => {
      const item = make('li', ''), line = make(own ? 'button' : 'span', '', 'other');
      if (own) {
        line.type = 'button';
        line.disabled = number === rank - 1 || text.includes('\ufffd') || text === '∅';
        line.setAttribute('aria-label', `put ${text} in place of ${token.textContent}, ${percent(p)}`);
        line.addEventListener('click', () => branch(token, number));
      }
      line.classList.toggle('stands', number === rank - 1);
      line.style.setProperty('--share', `${100 * p}%`);
      line.append(make('span', text), make('span', percent(p)));
      item.append(line);
      list.append(item);
    });
    found.push(list);
  }
  if (own) {
    const on = make('button', 'Write on after this token', 'on');
    on.type = 'button';
    on.addEventListener('click', () => branch(token, null));
    found.push(on);
  }
  return found;
}

function branch(token, alternative) {
  unpin();
  hide();
  trigger('branch', {text: token.section.text, token: token.number, alternative});
}

// Values that stay until something else is done, with buttons.
function pin(token, focus) {
  if (!live) return;
  pinned = token;
  tip.classList.add('pinned');
  tip.setAttribute('role', 'dialog');
  tip.setAttribute('aria-label', `token ${token.number}: what else`);
  show(token);
  if (focus) tip.querySelector('button:enabled')?.focus();
}

function unpin() {
  pinned = null;
  tip.classList.remove('pinned');
  tip.setAttribute('role', 'tooltip');
  tip.removeAttribute('aria-label');
}

// The same token in the other pane, and its place in the plots.
function point({section, number, pane}) {
  for (const other of element.querySelectorAll('.text > .here')) other.classList.remove('here');
  for (const other of section.panes) if (other !== pane) other.tokens[number].classList.add('here');
  place(section, '.here', number, Math.max(1, pane.tokens.length / 300));
}

function place(section, selector, from, width) {
  for (const bar of section.root.querySelectorAll(`svg ${selector}`)) {
    bar.setAttribute('x', from);
    bar.setAttribute('width', width);
  }
}

function hide() {
  if (pinned) return;
  tip.hidden = true;
  for (const other of element.querySelectorAll('.text > .here')) other.classList.remove('here');
  for (const section of sections) place(section, '.here', 0, 0);
}

function activate(token) {
  const {pane, number} = token;
  unpin();
  for (const other of element.querySelectorAll('.text > [id]')) other.removeAttribute('id');
  token.id = 'ph-active';
  token.setAttribute('aria-label', [`token ${number}`, token.textContent,
    ...lines(token).map(([name, value]) => `${name} ${value}`)].join(', '));
  pane.active = number;
  pane.setAttribute('aria-activedescendant', 'ph-active');
  if (document.activeElement !== pane) pane.focus({preventScroll: true});
  token.scrollIntoView({block: 'nearest'});
  show(token);
}

function highlight(text, first, last) {
  highlighted = `${text}: ${first} to ${last}`;
  for (const section of sections) {
    const inside = (number) => section.text === text && first <= number && number <= last;
    for (const {tokens} of section.panes) {
      tokens.forEach((token, number) => {
        token.classList.toggle('marked', inside(number));
        token.setAttribute('aria-selected', String(inside(number)));
      });
    }
    place(section, '.marked', first, section.text === text ? last - first + 1 : 0);
  }
}

function mark(section, one, other) {
  const [first, last] = [Math.min(one, other), Math.max(one, other)];
  highlight(section.text, first, last);
  // A key held down marks anew at each step: its means are asked for where it stops.
  clearTimeout(marking);
  marking = setTimeout(() => trigger('mark', {text: section.text, first, last}), 60);
}

// The token above or below: the nearest one of the next line.
function vertical(tokens, number, step) {
  const from = tokens[number].getBoundingClientRect();
  let line = null, best = null, distance = Infinity;
  for (let i = number + step; tokens[i]; i += step) {
    const box = tokens[i].getBoundingClientRect(), apart = Math.abs(box.left - from.left);
    if (Math.abs(box.top - from.top) < from.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > from.height / 2) break;
    if (apart < distance) [best, distance] = [tokens[i], apart];
  }
  return best;
}

const tokenAt = (node) => {
  const found = (node.nodeType === 1 ? node : node.parentElement)?.closest('.text > span');
  return found?.section ? found : null;
};

element.addEventListener('pointerdown', () => { pressed = true; });
element.addEventListener('mouseover', ({target}) => {
  const token = tokenAt(target);
  if (token && !pinned) show(token);
});
element.addEventListener('mouseout', ({target}) => { if (tokenAt(target) || target.closest('svg')) hide(); });
element.addEventListener('focusin', ({target}) => {
  // Not where a pointer brought the focus, which a click then takes to its token.
  if (target.tokens && target.matches(':focus-visible')) activate(target.tokens[target.active]);
});
element.addEventListener('focusout', ({target}) => { if (target.tokens) hide(); });
document.addEventListener('scroll', ({target}) => {
  const {top = 0, bottom = 0} = pinned?.getBoundingClientRect() ?? {};
  if (pinned && bottom > 0 && top < innerHeight) put(pinned);
  else if (pinned || element.contains(target)) {
    unpin();
    hide();
  }
}, true);
document.addEventListener('pointerdown', ({target}) => {
  if (pinned && !tip.contains(target)) {
    unpin();
    hide();
  }
});
tip.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape') return;
  const {pane} = pinned;
  unpin();
  pane.focus();
});

element.addEventListener('keydown', (event) => {
  const {tokens, active: number, section} = event.target;
  if (!tokens) return;
  const next = {
    ArrowRight: () => tokens[number + 1], ArrowLeft: () => tokens[number - 1],
    ArrowDown: () => vertical(tokens, number, 1), ArrowUp: () => vertical(tokens, number, -1),
    Home: () => tokens[0], End: () => tokens.at(-1),
  }[event.key];
  if (next) {
    event.preventDefault();
    const to = next();
    if (!to) return;
    activate(to);
    if (event.shiftKey) {
      anchor ??= number;
      mark(section, anchor, to.number);
    } else {
      anchor = null;
    }
  } else if (event.key === 'Enter' && live) {
    event.preventDefault();
    pin(tokens[number], true);
  } else if (event.key === ' ') {
    event.preventDefault();
    mark(section, number, number);
  } else if (event.key === 'Escape') {
    unpin();
    tip.hidden = true;
    highlight(-1, 0, -1);
  }
});

const sectionOf = (row) => element.querySelector(row.getAttribute('href'));

async function copy(link) {
  const said = link.textContent;
  try {
    await navigator.clipboard.writeText(link.href);
    link.textContent = 'Copied';
  } catch {
    link.textContent = 'Copy it from the address'; // browsers may not let a page copy
  }
  setTimeout(() => { link.textContent = said; }, 2000);
}

addEventListener('hashchange', () => { if (live) location.reload(); });

element.addEventListener('click', (event) => {
  const {target, clientX} = event;
  const button = target.closest('[data-go]'), plot = target.closest('svg'), token = tokenAt(target);
  const section = sections.find(({root}) => root.contains(target));
  const link = target.closest('[data-link]'), row = target.closest('.means a');
  if (link) copy(link);
  else if (row) sectionOf(row).scrollIntoView();
  if (link || row) event.preventDefault();
  if (token && getSelection().isCollapsed) {
    activate(token);
    pin(token);
  }
  else if (button?.dataset.to) {
    const {go, to} = button.dataset;
    section.panes[0].tokens[go].scrollIntoView({block: 'nearest'});
    mark(section, +go, +to);
  }
  else if (button) activate(section.panes[0].tokens[+button.dataset.go]);
  else if (plot) activate(section.panes[0].tokens[along(plot, section, clientX)]);
});

function along(plot, section, x) {
  const {left, width} = plot.getBoundingClientRect(), count = section.panes[0].tokens.length;
  return Math.max(0, Math.min(count - 1, Math.floor((x - left) / width * count)));
}

element.addEventListener('mousemove', ({target, clientX, clientY}) => {
  const plot = target.closest('svg');
  if (!plot) return;
  const section = sections.find(({root}) => root.contains(plot));
  show(section.panes[0].tokens[along(plot, section, clientX)], {left: clientX + 12, top: clientY, bottom: clientY});
});

// Characters selected, by mouse, finger or keyboard, mark the tokens that they lie in.
let settled = 0;
document.addEventListener('selectionchange', () => {
  clearTimeout(settled);
  settled = setTimeout(() => {
    const selection = getSelection();
    if (!pressed || selection.isCollapsed || !element.contains(selection.anchorNode)) return;
    const range = selection.getRangeAt(0);
    const first = tokenAt(range.startContainer), end = tokenAt(range.endContainer);
    const last = end ?? first?.pane.tokens.at(-1); // a triple click goes on to what comes after
    if (!first || first.section !== last.section) return;
    const skipped = range.startOffset === range.startContainer.length ? 1 : 0;
    const short = end && range.endOffset === 0 ? 1 : 0;
    const [from, to] = [first.number + skipped, last.number - short];
    // A browser may tell twice of one selection; the fields may have been changed since.
    if (from <= to && highlighted !== `${first.section.text}: ${from} to ${to}`) mark(first.section, from, to);
  }, 250);
});

window.philens = {highlight};
// A link to what is shown stands in the address, too, where it is no step back.
const keepLink = () => { const link = element.querySelector('[data-link]'); if (link) history.replaceState(history.state, '', link.getAttribute('href')); };
watch('value', () => {
  setUp();
  keepLink();
  // Where it stands below the controls, as on a phone, what was asked for would not be seen.
  if (loaded && element.getBoundingClientRect().top > innerHeight * .8) element.scrollIntoView();
  loaded = true; // with the first example
});
setUp();
