"use strict";
// Keys of the labelling pages. Without a script everything works by mouse and Tab.

const typing = (element) => element.matches("textarea, select, input:not([type=radio]):not([type=checkbox])");
const scales = [...document.querySelectorAll("fieldset[data-scale]")];

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.metaKey || event.repeat) return;
  const form = document.querySelector("#task");
  if (event.key === "Enter" && event.ctrlKey) {
    form?.querySelector("[data-key=Enter]")?.click();
    return;
  }
  if (event.ctrlKey || typing(event.target)) return;
  if (scales.length && /^[1-9]$/.test(event.key)) {
    // A digit answers the scale in focus, else the first that is open, and moves on.
    const open = scales.find((scale) => !scale.querySelector(":checked"));
    const scale = event.target.closest("fieldset[data-scale]") ?? open ?? scales.at(-1);
    const choice = scale.querySelector(`input[value="${event.key}"]`);
    if (!choice) return;
    choice.checked = true;
    const next = scales[scales.indexOf(scale) + 1];
    (next?.querySelector(":checked") ?? next?.querySelector("input") ?? choice).focus();
    event.preventDefault();
    return;
  }
  if (event.key === "Enter" && event.target.matches("button, a, summary")) return;
  const target = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (target) {
    event.preventDefault();
    target.click();
  }
});

// A double click must not judge the next item, neither from this page nor from the next one that comes in between.
document.addEventListener("click", (event) => {
  if (event.detail > 1 && event.target.closest("button")) event.preventDefault();
});
document.querySelector("#task")?.addEventListener("submit", (event) => {
  if (event.target.dataset.sent) event.preventDefault();
  event.target.dataset.sent = "1";
});

// Beside the task where there is room, a tap away where there is none.
const guidelines = document.querySelector(".guidelines");
const wide = matchMedia("(min-width: 60rem)");
const beside = () => guidelines && (guidelines.open = wide.matches);
beside();
wide.addEventListener("change", beside);
