"use strict";

/* The K-LoRA panel of txt2img and of img2img: asks for the files and scores of a pair once, and draws the rest in the browser. */
(function(klora) {
    const TABS = ["txt2img", "img2img"];
    const DEBOUNCE = 250, TRY_AGAIN = 2500, MOST_PAIRS = 6;
    const panels = {};

    async function ask(route, body, signal) {
        const answer = await fetch(`./klora/internal/${route}`, {
            method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal,
        });
        return answer.ok ? answer.json() : {problem: `The WebUI answered with status ${answer.status}.`, again: false};
    }

    const field = (tab, name) => gradioApp().querySelector(`#${tab}_${name} input[type=number]`);

    /** Number in one of the host's own fields, `otherwise` where there is none. */
    function hostNumber(tab, name, otherwise) {
        const value = parseFloat((field(tab, name) || {}).value);
        return Number.isFinite(value) ? value : otherwise;
    }

    function decoded(name) {
        try {
            return decodeURIComponent(name);
        } catch {
            return name;
        }
    }

    /** The prompt of a tab, to put trigger words into. */
    class Prompt {
        constructor(tab) {
            this.tab = tab;
        }

        get area() {
            return gradioApp().querySelector(`#${this.tab}_prompt textarea`);
        }

        has(word) {
            return this.area.value.toLowerCase().includes(word.toLowerCase());
        }

        add(words) {
            for (const word of words.filter(one => !this.has(one))) {
                const before = this.area.value.replace(/[\s,]+$/, "");
                this.area.value = before ? `${before}, ${word}` : word;
            }
            updateInput(this.area);
        }
    }

    class Panel {
        constructor(tab, root) {
            this.tab = tab;
            this.root = root;
            this.constants = JSON.parse(root.dataset.constants);
            this.values = {...this.constants.defaults};
            this.prompt = new Prompt(tab);
            this.pairs = new Map();
            this.card = null;
            this.passes = [];
            this.shown = "planned";
            for (const [name, colour] of Object.entries(this.constants.colours)) root.style.setProperty(`--klora-${name}`, colour);
            this.build();
        }

        build() {
            const {element} = klora;
            this.cardPlace = element("div", {class: "klora-card-place"});
            this.status = element("p", {class: "klora-status", role: "status"});
            this.choices = element("div", {class: "klora-choices", role: "group", "aria-label": "Which map"});
            this.title = element("span", {class: "klora-title"});
            this.widen = element("button", {type: "button", class: "klora-choice", "aria-pressed": "false"}, "layer names");
            this.widen.addEventListener("click", () => {
                this.map.wide = !this.map.wide;
                this.widen.setAttribute("aria-pressed", String(this.map.wide));
                this.map.draw();
            });
            this.map = new klora.SelectionMap(this.constants.colours);
            this.mapPlace = element("div", {class: "klora-map-place", hidden: true},
                element("div", {class: "klora-map-head"}, this.choices, this.title, this.widen), this.map.root);
            this.root.replaceChildren(this.cardPlace, this.status, this.mapPlace);
        }

        get names() {
            const [subject, style] = ["subject", "style"].map(role => {
                const name = String(this.values[role] ?? "").trim();
                return name === "None" ? "" : name;
            });
            return {subject, style};
        }

        get kScale() {
            const read = klora.readNumber(this.values.k_scale, this.constants.numbers.k_scale);
            return read === undefined ? this.constants.defaults.k_scale : read;
        }

        get pairKey() {
            return JSON.stringify([this.names, this.kScale]);
        }

        get pair() {
            const known = this.pairs.get(this.pairKey);
            return known && known.layers ? known : null;
        }

        /** The controls hold other values now, by the user or by a pasted text. */
        changed(values) {
            const before = this.pairKey;
            this.values = values;
            this.shown = "planned";
            if (before !== this.pairKey || !this.card) this.refresh(DEBOUNCE);
            this.redraw();
        }

        /** Ask for the card and then for the scores; whatever was asked before is given up. */
        refresh(delay = 0) {
            clearTimeout(this.timer);
            if (this.asking) this.asking.abort();
            this.asking = null;
            if (!this.names.subject && !this.names.style) {
                this.card = null;
                this.say("");
                this.redraw();
                return;
            }
            this.timer = setTimeout(() => this.load(), delay);
        }

        async load() {
            const asking = this.asking = new AbortController(), {names, kScale, pairKey} = this;
            try {
                const card = await ask("card", names, asking.signal);
                if (asking.signal.aborted) return;
                this.card = card.problem ? {subject: null, style: null, layers: null, checkpoint: null, problems: [card.problem]} : card;
                this.redraw();
                if (card.layers && card.layers.shared && card.subject.base === card.style.base && !this.pairs.has(pairKey)) {
                    this.say("Scoring the pair: once, then it is kept …");
                    await this.score(names, kScale, pairKey, asking);
                }
                this.say("");
            } catch (error) {
                if (error.name === "AbortError") return;
                this.say("The WebUI does not answer: the card is shown when it does.");
                this.refresh(TRY_AGAIN);
            }
        }

        async score(names, kScale, pairKey, asking) {
            for (;;) {
                const found = await ask("scores", {...names, k_scale: kScale}, asking.signal);
                if (asking.signal.aborted) return;
                if (!found.again) {
                    this.pairs.set(pairKey, found);
                    if (this.pairs.size > MOST_PAIRS) this.pairs.delete(this.pairs.keys().next().value);
                    this.redraw();
                    return;
                }
                this.say(found.problem);
                await new Promise(resolve => setTimeout(resolve, TRY_AGAIN));
                if (asking.signal.aborted) return;
            }
        }

        say(sentence) {
            this.status.textContent = sentence;
            this.status.hidden = !sentence;
        }

        /** Draw at the next frame, however often it is asked for until then. */
        redraw() {
            if (this.frame) return;
            this.frame = requestAnimationFrame(() => {
                this.frame = null;
                this.draw();
            });
        }

        draw() {
            const plan = this.pair && this.planned();
            this.drawCard(plan);
            const applied = this.applied();
            if (!applied) this.shown = "planned";
            const view = this.shown === "planned" ? plan : applied;
            this.mapPlace.hidden = !(view && view.rows);
            if (this.mapPlace.hidden) return;
            this.drawChoices(applied);
            this.title.textContent = view.title;
            this.map.show(view);
        }

        drawCard(plan) {
            if (!this.card) {
                this.cardPlace.replaceChildren();
                return;
            }
            const known = this.pairs.get(this.pairKey) || {};
            const shares = plan && plan.rows ? plan.rows.map(row => klora.subjectShare(row)).filter(share => share !== null) : [];
            const share = shares.length ? shares.reduce((sum, one) => sum + one, 0) / shares.length : null;
            const problems = [known.problem, plan && plan.problem].filter(Boolean).join(" ");
            const offered = ["subject", "style"].every(role => (this.card[role] || {}).base === "FLUX") && this.values.schedule === "s";
            const more = {gamma: plan && plan.rows ? plan.gamma : known.gamma ?? null, share, warnings: known.warnings || [], problem: problems, offered};
            const drawn = JSON.stringify([this.card, more]);
            if (drawn !== this.drawnCard || !this.cardPlace.firstChild) {
                this.cardPlace.replaceChildren(klora.drawCard(this.card, more, this.prompt, () => this.usePreset()));
                this.drawnCard = drawn;
            }
            this.markWords();
        }

        usePreset() {
            gradioApp().querySelector(`#klora_${this.tab}_preset`).click();
        }

        markWords() {
            for (const chip of this.cardPlace.querySelectorAll("[data-word]")) {
                chip.setAttribute("aria-pressed", String(this.prompt.has(chip.dataset.word)));
            }
        }

        /** Settings of a plan from values by name; {problem} where a number is none. */
        settingsOf(values, steps, seed) {
            const numbers = {};
            for (const name of ["alpha", "beta", "gamma"]) {
                numbers[name] = klora.readNumber(values[name], this.constants.numbers[name]);
                if (numbers[name] === undefined) {
                    const {label, words, bounds} = this.constants.numbers[name];
                    return {problem: `${label} is ${[...words, `a number from ${bounds[0]} to ${bounds[1]}`].join(" or ")}, not “${values[name]}”.`};
                }
            }
            const beta = numbers.beta === "auto" ? this.constants.schedules[values.schedule] : numbers.beta;
            return {selector: values.selector, schedule: values.schedule, alpha: numbers.alpha, beta, gamma: numbers.gamma, steps, seed};
        }

        /** Steps of the whole schedule, and the first that runs: img2img enters where its noise level stands. */
        course() {
            const steps = Math.max(1, Math.round(hostNumber(this.tab, "steps", 20)));
            if (this.tab !== "img2img") return {steps, first: 0};
            const strength = Math.min(hostNumber(this.tab, "denoising_strength", 0.75), 0.999);
            const whole = opts.img2img_fix_steps ? Math.trunc(steps / strength) || 0 : steps;
            const run = (opts.img2img_fix_steps ? steps - 1 : Math.trunc(strength * steps)) + 1;
            return this.values.hires === "restart" ? {steps: run, first: 0} : {steps: Math.max(whole, run), first: Math.max(whole - run, 0)};
        }

        planned() {
            const seed = hostNumber(this.tab, "seed", -1), {steps, first} = this.course();
            const settings = this.settingsOf(this.values, steps, Math.max(0, Math.trunc(seed)));
            if (settings.problem) return settings;
            const plan = klora.makePlan(this.pair, settings, this.constants.alphaM);
            for (const row of plan.rows.slice(0, first)) row.fill(klora.NOT_RUN);
            const unknown = settings.selector === "Random" && seed < 0 ? ", here with seed 0: the true one is drawn at Generate" : "";
            return {...plan, pair: this.pair, selector: settings.selector, names: this.names, title: this.titleOf(settings, plan.gamma) + unknown};
        }

        titleOf({selector, schedule, alpha, beta, steps}, gamma) {
            const sum = `${klora.short(alpha)} t/T ${beta < 0 ? "−" : "+"} ${klora.short(Math.abs(beta))}`;
            const s = schedule === "s*" ? `S* = (${sum}) mod ${this.constants.alphaM}` : `S = ${sum}`;
            return `${selector}, ${s}, γ ${klora.short(gamma)}, ${steps} steps`;
        }

        drawChoices(applied) {
            const choice = (text, pressed, act) => {
                const button = klora.element("button", {type: "button", class: "klora-choice", "aria-pressed": String(pressed)}, text);
                button.addEventListener("click", () => {
                    act();
                    this.draw();
                });
                return button;
            };
            const batches = new Set(this.passes.map(pass => pass.batch)).size;
            const nameOf = pass => ["applied", batches > 1 ? `batch ${pass.batch + 1}` : "", pass.pass === "hires" ? "hires pass" : ""].filter(Boolean).join(", ");
            this.choices.replaceChildren(choice("planned", this.shown === "planned", () => {
                this.shown = "planned";
            }), ...(applied ? this.passes : []).map((pass, i) => choice(nameOf(pass), this.shown === "applied" && this.passIndex === i, () => {
                this.shown = "applied";
                this.passIndex = i;
            })));
        }

        /** The host has made a picture: what was recorded of it, if K-LoRA took part. */
        generated(text) {
            let info;
            try {
                info = JSON.parse(text);
            } catch {
                return;
            }
            this.info = info;
            this.passes = (info.extra_generation_params || {})["K-LoRA applied"] || [];
            this.passIndex = 0;
            if (this.passes.length) this.shown = "applied";
            this.redraw();
        }

        /** The recorded pass that is chosen, as the map draws it; null where there is none or its layers are not known here. */
        applied() {
            const pass = this.passes[this.passIndex];
            if (!pass) return null;
            const params = this.info.extra_generation_params, values = {...this.constants.defaults};
            for (const [name, label] of Object.entries(this.constants.infotext)) {
                if (label in params) values[name] = decoded(String(params[label]));
            }
            const pair = this.pairOf(pass, values);
            if (!pair) return null;
            const seed = (this.info.all_seeds || [0])[pass.batch * (this.info.batch_size || 1)] || 0;
            const settings = this.settingsOf(values, pass.steps, seed);
            const rows = klora.recordedRows(pass, pair.layers.name.length);
            if (settings.problem) return {rows, s: null, gamma: null, pair, names: values, selector: values.selector, title: "as applied"};
            const plan = klora.makePlan(pair, settings, this.constants.alphaM);
            return {...plan, rows, pair, selector: settings.selector, names: values, title: this.verdict(rows, plan.rows)};
        }

        verdict(rows, planned) {
            const ran = rows.filter(row => row[0] !== klora.NOT_RUN).length;
            const other = rows.reduce((sum, row, step) => row[0] === klora.NOT_RUN ? sum : sum + row.filter((choice, layer) => choice !== planned[step][layer]).length, 0);
            return `last picture: ${ran} of ${rows.length} steps ran, ${other ? `${other} choices other than planned` : "all as planned"}`;
        }

        pairOf(pass, {subject, style}) {
            const own = key => {
                const [names] = JSON.parse(key);
                return names.subject === subject && names.style === style;
            };
            const known = [this.pair, ...[...this.pairs].filter(([key]) => own(key)).map(([, pair]) => pair)];
            const pair = known.find(one => one && one.layers && (one !== this.pair || own(this.pairKey)));
            if (!pair) return null;
            const width = (pass.rows.find(row => row !== null) || {length: pair.layers.name.length}).length;
            if (!pass.layers) return width === pair.layers.name.length ? pair : null;
            const at = new Map(pair.layers.name.map((name, i) => [name, i])), picked = pass.layers.map(name => at.get(name));
            if (picked.includes(undefined)) return null;
            return {...pair, layers: Object.fromEntries(Object.entries(pair.layers).map(([name, column]) => [name, picked.map(i => column[i])]))};
        }

        /** Something on the page changed that may matter here. */
        look() {
            const info = (gradioApp().querySelector(`#generation_info_${this.tab} textarea`) || {}).value || "";
            if (info !== (this.seenInfo ?? "")) {
                this.seenInfo = info;
                this.generated(info);
            }
            const log = (gradioApp().querySelector(`#html_log_${this.tab}`) || {}).textContent;
            if (this.seenLog !== log) {
                this.seenLog = log;
                if (this.card && !this.card.checkpoint) this.refresh(DEBOUNCE);
            }
            const checkpoint = (gradioApp().querySelector("#setting_sd_model_checkpoint input") || {}).value + opts.sd_model_checkpoint;
            if (this.seenCheckpoint !== checkpoint) {
                this.seenCheckpoint = checkpoint;
                if (this.card) this.refresh();
            }
            const fields = ["steps", "seed", "denoising_strength"].map(name => hostNumber(this.tab, name, null)).join();
            if (this.seenFields !== fields) {
                this.seenFields = fields;
                if (this.card) this.redraw();
            }
        }
    }

    /** Called by the page whenever a control of the panel changes, with the values of all by name. */
    klora.changed = function(tab, names, values) {
        const panel = panelOf(tab);
        if (panel) panel.changed(Object.fromEntries(names.map((name, i) => [name, values[i]])));
        return [];
    };

    function panelOf(tab) {
        const root = gradioApp().querySelector(`#klora_${tab}_view [data-constants]`);
        if (root && (!panels[tab] || panels[tab].root !== root)) panels[tab] = new Panel(tab, root);
        return panels[tab];
    }

    const look = () => TABS.forEach(tab => panels[tab] && panels[tab].look());

    if (globalThis.onUiLoaded) {
        onUiLoaded(() => {
            TABS.forEach(panelOf);
            const own = TABS.map(tab => ["steps", "seed", "denoising_strength"].map(name => `#${tab}_${name}`)).flat().join();
            gradioApp().addEventListener("input", event => {
                if (event.target.closest(own)) look();
                else if (event.target.closest(TABS.map(tab => `#${tab}_prompt`).join())) TABS.forEach(tab => panels[tab] && panels[tab].markWords());
            });
        });
        onAfterUiUpdate(look);
    }
})(globalThis.klora = globalThis.klora || {});
