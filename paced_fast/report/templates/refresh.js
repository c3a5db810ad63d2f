// Loads the page of a running run again every `data-refresh` seconds; place, filters and open parts stay as they are.
(function () {
  const seconds = Number(document.body.dataset.refresh), key = 'paced-fast report ' + location.pathname;
  const sections = () => [...document.querySelectorAll('header, section[id]')];
  const parts = () => [...document.querySelectorAll('details')].map(
    part => [(part.closest('[id]') || {id: ''}).id + ' ' + part.querySelector('summary').textContent, part]);
  function place() {
    const passed = sections().filter(section => section.getBoundingClientRect().top <= 1);
    const last = passed[passed.length - 1] || document.body;
    return {id: last.id, under: -last.getBoundingClientRect().top};
  }
  function goTo(state) {
    const from = (state.id && document.getElementById(state.id)) || document.querySelector('header');
    const top = state.id ? from.getBoundingClientRect().top + scrollY + state.under : state.y;
    scrollTo({top, behavior: 'instant'});
  }
  function restore(state) {
    for (const id of state.checked) { const choice = document.getElementById(id); if (choice) choice.checked = true; }
    for (const [name, part] of parts()) if (name in state.open) part.open = state.open[name];
    goTo(state);
    addEventListener('load', () => goTo(state));
  }
  try {
    const text = sessionStorage.getItem(key);
    sessionStorage.removeItem(key);
    if (text) restore(JSON.parse(text));
  } catch (error) { /* without storage the browser keeps the place itself */ }
  if (!seconds) return;
  function reload() {
    const pause = document.getElementById('pause');
    if (document.hidden || (pause && pause.checked) || String(getSelection())) return;
    try {
      history.scrollRestoration = 'manual';
      sessionStorage.setItem(key, JSON.stringify({...place(), y: scrollY,
        checked: [...document.querySelectorAll('input:checked')].map(choice => choice.id),
        open: Object.fromEntries(parts().map(([name, part]) => [name, part.open]))}));
    } catch (error) { history.scrollRestoration = 'auto'; }
    location.reload();
  }
  setInterval(reload, 1000 * seconds);
})();
