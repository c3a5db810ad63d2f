// Marks the row of links while it has more to the right than there is room for.
(function () {
  const row = document.querySelector('nav');
  if (!row) return;
  const mark = () => row.classList.toggle('more', row.scrollLeft + row.clientWidth < row.scrollWidth - 2);
  row.addEventListener('scroll', mark, {passive: true});
  addEventListener('resize', mark);
  mark();
})();
