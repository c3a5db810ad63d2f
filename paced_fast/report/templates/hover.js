// Shows the numbers of a chart under the pointer. They are in `data-hover`, their places as shares of the plot.
(function () {
  const tip = document.getElementById('tip'), cross = document.getElementById('cross');
  function hide() { tip.style.display = cross.style.display = 'none'; }
  function row(color, text) {
    const line = document.createElement('div');
    if (color !== null) { const key = document.createElement('i'); key.className = 'k' + color; line.append(key); }
    line.append(text);
    tip.append(line);
  }
  function nearest(points, x) {
    let best = 0;
    points.forEach((p, i) => { if (Math.abs(p[0] - x) < Math.abs(points[best][0] - x)) best = i; });
    return points[best];
  }
  function grid(data, x, y) {
    const column = nearest(data.g.x, x), i = data.g.x.indexOf(column);
    const j = Math.min(data.g.y.length - 1, Math.max(0, Math.floor(y * data.g.y.length)));
    row(null, data.x + ' ' + column[1]);
    row(null, data.g.y[j] + ': ' + (100 * data.g.v[i][j]).toFixed(1) + '%');
    return column[0];
  }
  function series(data, x) {
    const near = nearest(data.s.flatMap(s => s.p), x);
    row(null, data.x + ' ' + near[1]);
    for (const s of data.s) {
      const p = s.p.length ? nearest(s.p, near[0]) : null;
      if (p && Math.abs(p[0] - near[0]) < 0.007) row(s.c, s.n + ': ' + p[2]);
    }
    return near[0];
  }
  for (const chart of document.querySelectorAll('.chart[data-hover]')) {
    const data = JSON.parse(chart.dataset.hover), plot = chart.querySelector('.plot');
    if (!plot || !(data.g || data.s.some(s => s.p.length))) continue;
    function show(event) {
      const box = plot.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width, y = (box.bottom - event.clientY) / box.height;
      tip.replaceChildren();
      const where = data.g ? grid(data, x, y) : series(data, x);
      Object.assign(cross.style, {display: 'block', left: box.left + where * box.width + 'px',
        top: box.top + 'px', height: box.height + 'px'});
      tip.style.display = 'block';
      const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
      tip.style.left = Math.max(4, right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14) + 'px';
      tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6)) + 'px';
    }
    chart.addEventListener('pointermove', show);
    chart.addEventListener('pointerdown', show);
    chart.addEventListener('pointerleave', hide);
  }
  addEventListener('scroll', hide, {passive: true});
})();
