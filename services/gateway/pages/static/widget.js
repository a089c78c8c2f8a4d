"use strict";
// The chat on a page of another site, by one script tag:
//
//   <script src="https://chat.example.com/widget.js" data-title="Ask us" data-key="sk-..." async></script>
//
// data-key      key that may chat and nothing else; it stands in the page, so give it a small quota
// data-customer token of the customer who is logged in (`identity.jwt`); later: steersmanChat.customer(token)
// data-title    words on the button
//
// The page needs `script-src` and `frame-src` of the gateway in its content security policy, and no more: styles are set
// by script, and everything else happens in a frame of the gateway, which names this site in `embedOrigins`.
(() => {
  const script = document.currentScript;
  const home = new URL(script.src).origin;
  const given = { key: script.dataset.key, customer: script.dataset.customer };
  const title = script.dataset.title || "Chat";

  const host = document.createElement("div");
  const root = host.attachShadow({ mode: "open" });
  const style = new CSSStyleSheet();
  style.replaceSync(`
    button { position: fixed; right: 1rem; bottom: 1rem; z-index: 2147483000; border: 0; border-radius: 2rem; cursor: pointer;
      padding: .75rem 1.25rem; font: 600 1rem/1.2 system-ui, sans-serif; background: #0b5cad; color: #fff;
      box-shadow: 0 2px 10px rgb(0 0 0 / .3); }
    button:focus-visible { outline: 3px solid #0b5cad; outline-offset: 3px; }
    iframe { position: fixed; right: 1rem; bottom: 4.5rem; z-index: 2147483000; border: 1px solid #8a96a3; border-radius: .75rem;
      width: min(26rem, calc(100vw - 2rem)); height: min(38rem, calc(100dvh - 6rem)); background: Canvas;
      box-shadow: 0 4px 24px rgb(0 0 0 / .3); }
    iframe[hidden] { display: none; }
  `);
  root.adoptedStyleSheets = [style];

  const button = document.createElement("button");
  button.type = "button";
  button.textContent = title;
  button.setAttribute("aria-expanded", "false");
  let frame = null;

  // A fragment reaches no server and no log.
  function address() {
    const fragment = new URLSearchParams(Object.entries(given).filter(([, value]) => value));
    return `${home}/widget#${fragment}`;
  }

  function toggle(open) {
    if (open && !frame) {
      frame = document.createElement("iframe");
      frame.title = title;
      frame.src = address();
      root.append(frame);
    }
    if (frame) frame.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) frame.focus();
    else button.focus();
  }

  button.addEventListener("click", () => toggle(button.getAttribute("aria-expanded") !== "true"));
  // Escape inside of the frame is told by its page.
  addEventListener("message", (event) => {
    if (event.origin === home && event.source === frame?.contentWindow && event.data === "steersman-close") toggle(false);
  });
  root.append(button);
  const attach = () => document.body.append(host);
  if (document.body) attach();
  else addEventListener("DOMContentLoaded", attach);

  window.steersmanChat = {
    open: () => toggle(true),
    close: () => toggle(false),
    customer: (token) => {
      given.customer = token;
      if (!frame) return;
      frame.remove(); // another person's conversation does not go on
      frame = null;
      toggle(button.getAttribute("aria-expanded") === "true");
    },
  };
})();
