// The image under the pointer, on a map of features; without this script the points keep their titles.
for (const map of document.querySelectorAll(".map")) {
  const columns = Number(map.dataset.columns), tip = map.querySelector(".tip"), points = map.querySelectorAll("circle");
  const image = tip.querySelector(".image"), says = tip.querySelector("span"), side = 112;
  image.style.backgroundImage = `url(${map.dataset.sprite})`;
  image.style.backgroundSize = `${columns * side}px`;
  for (const point of points) {
    point.dataset.says = point.querySelector("title").textContent;
    point.replaceChildren();
  }
  const show = (event) => {
    const point = event.target;
    tip.hidden = !point.dataset.says;
    if (tip.hidden) return;
    const number = Number(point.dataset.i), frame = map.getBoundingClientRect(), place = point.getBoundingClientRect();
    image.style.backgroundPosition = `${-(number % columns) * side}px ${-Math.floor(number / columns) * side}px`;
    says.textContent = point.dataset.says;
    const left = place.left - frame.left + 14, top = place.top - frame.top + 14;
    tip.style.left = `${Math.max(0, Math.min(left, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${top}px`;
  };
  map.addEventListener("pointerover", show);
  map.addEventListener("pointerleave", () => { tip.hidden = true; });
}
