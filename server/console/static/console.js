// Shows one step of a form at a time. Without scripts all of them are there.
for (const form of document.querySelectorAll("form[data-steps]")) {
  const steps = [...form.querySelectorAll("[data-step]")];
  const [back, next, send] = ["back", "next", "send"].map((name) => form.querySelector(`[data-${name}]`));
  let at = 0;

  const show = (index, focus) => {
    at = index;
    steps.forEach((step, number) => (step.hidden = number !== at));
    back.hidden = at === 0;
    next.hidden = at === steps.length - 1;
    send.hidden = !next.hidden;
    if (focus) steps[at].querySelector("input, textarea").focus();
  };
  const isValid = (step) => [...step.querySelectorAll("input, textarea")].every((field) => field.reportValidity());

  back.addEventListener("click", () => show(at - 1, true));
  next.addEventListener("click", () => isValid(steps[at]) && show(at + 1, true));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input") && !next.hidden) {
      event.preventDefault();
      next.click();
    }
  });
  show(0, false);
}
