"use strict";

/* The pre-flight card: what the two files are, whether they fit, and what to do where they don't. */
(function(klora) {
    const element = (...args) => klora.element(...args);
    const ROLES = {subject: "Subject", style: "Style"};
    const ENCODERS = {te1: "CLIP-L", te2: "CLIP-G", t5: "T5"};

    function facts(file) {
        const encoders = Object.entries(file.textEncoders).map(([name, count]) => `${ENCODERS[name] || name} ${count}`).join(", ");
        return [
            ["format", `${file.kinds}, ${file.dialect} keys`],
            ["rank", `${file.rank}, network alpha ${file.networkAlpha}`],
            ["layers", `${file.layers}; text encoders: ${encoders || "none"}${file.unknown ? `; ${file.unknown} unknown tensors` : ""}`],
        ];
    }

    function thumbnail(file) {
        const empty = element("div", {class: "klora-thumb klora-thumb-empty", "aria-hidden": "true"});
        if (!file.preview) return empty;
        const image = element("img", {class: "klora-thumb", src: file.preview, alt: `Preview of ${file.name}`, loading: "lazy"});
        image.addEventListener("error", () => image.replaceWith(empty));
        return image;
    }

    function words(file, prompt) {
        if (!file.words.length) return element("p", {class: "klora-words klora-faint"}, "no trigger words in the file");
        const chips = file.words.map(word => {
            const chip = element("button", {type: "button", class: "klora-word", title: "Put this trigger word into the prompt"}, word);
            chip.addEventListener("click", () => prompt.add([word]));
            chip.dataset.word = word;
            return chip;
        });
        const all = element("button", {type: "button", class: "klora-word klora-all", title: "Put all trigger words into the prompt"}, "add all");
        all.addEventListener("click", () => prompt.add(file.words));
        return element("div", {class: "klora-words"}, element("span", {class: "klora-faint"}, "trigger words"), ...chips, file.words.length > 1 ? all : null);
    }

    function filePane(role, file, prompt) {
        const name = [element("span", {class: "klora-role"}, ROLES[role]), element("b", {}, file ? file.name : "not chosen yet")];
        const pane = (...body) => element("section", {class: `klora-file klora-of-${role}`}, ...body);
        if (!file) return pane(element("header", {}, element("div", {}, ...name)), element("p", {class: "klora-faint"}, `Choose a ${role} LoRA above.`));
        if (file.problem) return pane(element("header", {}, element("div", {}, ...name)), element("p", {class: "klora-problem"}, file.problem));
        const origin = [element("span", {}, file.base), file.trainedOn ? element("span", {class: "klora-faint"}, `trained on ${file.trainedOn}`) : null];
        const list = element("dl", {}, ...facts(file).flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]));
        return pane(element("header", {}, thumbnail(file), element("div", {}, ...name, ...origin)), list, words(file, prompt));
    }

    function tile(name, value, note, extra) {
        return element("div", {class: "klora-tile"}, element("span", {class: "klora-faint"}, name), element("b", {}, value),
            element("span", {class: "klora-faint"}, note), extra);
    }

    function shareBar(share) {
        const held = element("i", {class: "klora-subject"});
        held.style.width = `${share * 100}%`;
        return element("span", {class: "klora-bar klora-style", "aria-hidden": "true"}, held);
    }

    /** What is known of the whole pair; gamma and share are null while it is not scored. */
    function tiles({layers, checkpoint}, gamma, share) {
        if (!layers) return [];
        const only = ["subject", "style"].filter(role => layers[role]).map(role => `${layers[role]} only in the ${role}`).join(", ");
        const fits = {sdxl: "SDXL", flux: "FLUX"}[checkpoint && checkpoint.base] || "of another kind";
        return [
            tile("layers both change", String(layers.shared), only || "none in one file only"),
            tile("γ", gamma === null ? "…" : klora.short(gamma), "balance of the two"),
            tile("subject's share", share === null ? "…" : klora.percent(share), "of layers and steps", share === null ? null : shareBar(share)),
            tile("checkpoint", checkpoint ? fits : "not loaded", checkpoint ? checkpoint.name : "told when it is loaded"),
        ];
    }

    function offer(preset) {
        const button = element("button", {type: "button", class: "klora-choice", title: "Sets the schedule to S* and β to auto"}, "use S*");
        button.addEventListener("click", preset);
        return element("p", {class: "klora-offer"}, "For FLUX the paper's authors recommend the schedule S*.", button);
    }

    /**
     * The card as elements.
     * @param card the answer of /klora/internal/card
     * @param more {gamma, share, warnings, problem}: of the scored pair, null or empty before; whether the preset is to be offered
     * @param prompt {add(words)}
     * @param preset sets the controls to what is recommended for FLUX
     */
    function drawCard(card, more, prompt, preset) {
        const problems = [...card.problems, ...(more.problem ? [more.problem] : [])];
        return element("div", {class: "klora-card"},
            element("div", {class: "klora-files"}, ...Object.keys(ROLES).map(role => filePane(role, card[role], prompt))),
            element("div", {class: "klora-tiles"}, ...tiles(card, more.gamma, more.share)),
            more.offered ? offer(preset) : null,
            ...problems.map(sentence => element("p", {class: "klora-problem", role: "alert"}, sentence)),
            ...more.warnings.map(sentence => element("p", {class: "klora-warning"}, sentence)));
    }

    Object.assign(klora, {drawCard});
})(globalThis.klora = globalThis.klora || {});
