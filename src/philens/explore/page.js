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

// A pane is a list of options, its tokens: it has the keyboard's focus, and one of its tokens is the active one.
function setUp() {
  hide();
  anchor = null;
  highlighted = '';
  sections = [...element.querySelectorAll('.reading')].map((root, text) => {
    const section = {root, text, panes: [], values: JSON.parse(root.dataset.values)};
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

function show(token, box) {
  const piece = token.textContent.replace(/\n$/, '');
  const head = document.createElement('b');
  head.textContent = `token ${token.number}  ${piece}`;
  const list = document.createElement('dl');
  for (const [name, value] of lines(token)) {
    const term = document.createElement('dt'), detail = document.createElement('dd');
    term.textContent = name;
    detail.textContent = value;
    list.append(term, detail);
  }
  tip.replaceChildren(head, list);
  tip.hidden = false;
  const at = box || token.getClientRects()[0] || token.getBoundingClientRect();
  const {offsetWidth: width, offsetHeight: height} = tip;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - width - 8))}px`;
  const above = at.top - height - 8;
  tip.style.top = `${above > 4 ? above : at.bottom + 8}px`;
  point(token);
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
  tip.hidden = true;
  for (const other of element.querySelectorAll('.text > .here')) other.classList.remove('here');
  for (const section of sections) place(section, '.here', 0, 0);
}

function activate(token) {
  const {pane, number} = token;
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
element.addEventListener('mouseover', ({target}) => { const token = tokenAt(target); if (token) show(token); });
element.addEventListener('mouseout', ({target}) => { if (tokenAt(target) || target.closest('svg')) hide(); });
element.addEventListener('focusin', ({target}) => {
  // Not where a pointer brought the focus, which a click then takes to its token.
  if (target.tokens && target.matches(':focus-visible')) activate(target.tokens[target.active]);
});
element.addEventListener('focusout', ({target}) => { if (target.tokens) hide(); });
element.addEventListener('scroll', () => { tip.hidden = true; }, true);

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
  } else if (event.key === 'Enter' || event.key === ' ') {
    event.preventDefault();
    mark(section, number, number);
  } else if (event.key === 'Escape') {
    tip.hidden = true;
    highlight(-1, 0, -1);
  }
});

element.addEventListener('click', ({target, clientX}) => {
  const button = target.closest('[data-go]'), plot = target.closest('svg'), token = tokenAt(target);
  const section = sections.find(({root}) => root.contains(target));
  if (token && getSelection().isCollapsed) activate(token);
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
watch('value', () => {
  setUp();
  // Where it stands below the controls, as on a phone, what was asked for would not be seen.
  if (loaded && element.getBoundingClientRect().top > innerHeight * .8) element.scrollIntoView();
  loaded = true; // with the first example
});
setUp();
