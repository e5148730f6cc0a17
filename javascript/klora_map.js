"use strict";

/* The selection map in the page: steps run down, layers across. Beside it are the schedule and the subject's
   share at every step. */
(function(klora) {
    const AXIS = 34, TOP = 30, BELOW = 46, BLOCK_GAP = 2, GROUP_GAP = 8, CHART = 158, CURVE = 92;
    const HEIGHT = 300, LEAST_ROW = 4, MOST_ROW = 20, LEAST_CELL = 0.3, MOST_CELL = 16, WIDE_CELL = 12;
    const NAMES = 170, MOST_PIXELS = 16000;
    const NARROW = 560;

    const percent = share => share === null ? "–" : `${Math.round(share * 100)}%`;
    const short = number => number === 0 ? "0" : Number(number.toPrecision(4)).toString();

    function element(tag, attributes = {}, ...children) {
        const made = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) {
            if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
            else if (value === true) made.setAttribute(name, "");
            else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
        }
        made.append(...children.filter(child => child !== null && child !== undefined));
        return made;
    }

    /** The layers in the order of the network, with their places on the map. */
    function layOut(layers, cell) {
        const order = [...layers.place.keys()].sort((a, b) => layers.place[a] - layers.place[b]);
        const columns = [], blocks = [], groups = [];
        let left = 0;
        for (const layer of order) {
            const block = layers.block[layer], group = layers.group[layer];
            const last = columns[columns.length - 1];
            if (last && last.group !== group) left += GROUP_GAP;
            else if (last && last.block !== block) left += BLOCK_GAP;
            const column = {layer, left, block, group};
            columns.push(column);
            for (const [spans, name] of [[blocks, block], [groups, group]]) {
                const span = spans[spans.length - 1];
                if (!span || span.name !== name) {
                    spans.push({name, left, right: left + cell, layers: [layer]});
                } else {
                    span.right = left + cell;
                    span.layers.push(layer);
                }
            }
            left += cell;
        }
        return {columns, blocks, groups, width: left};
    }

    function gaps(layers) {
        const {columns, width} = layOut(layers, 0);
        return columns.length ? width : 0;
    }

    /** The context of a canvas of this many CSS pixels, sharp on any screen, a pixel for every column. */
    function canvasOf(canvas, width, height, narrowest = 1) {
        const ratio = window.devicePixelRatio || 1, least = Math.min(1, narrowest);
        const whole = Math.ceil(ratio * least) / least;
        const scale = Math.min(whole, MOST_PIXELS / Math.max(width, 1));
        canvas.width = Math.round(width * scale);
        canvas.height = Math.round(height * scale);
        canvas.style.width = `${width}px`;
        canvas.style.height = `${height}px`;
        const context = canvas.getContext("2d");
        context.setTransform(scale, 0, 0, scale, 0, 0);
        context.clearRect(0, 0, width, height);
        context.font = "11px system-ui, sans-serif";
        context.textBaseline = "middle";
        return context;
    }

    /** Strokes for layers that only one of the LoRAs changes. */
    function hatch(context, colour) {
        const tile = document.createElement("canvas");
        tile.width = tile.height = 8;
        const pen = tile.getContext("2d");
        pen.strokeStyle = colour;
        pen.lineWidth = 1.6;
        pen.beginPath();
        for (const x of [-8, 0, 8]) {
            pen.moveTo(x, 8);
            pen.lineTo(x + 8, 0);
        }
        pen.stroke();
        return context.createPattern(tile, "repeat");
    }

    /** One map in the page. `show` draws a plan or a recorded pass; the only other state is the pointer. */
    class SelectionMap {
        constructor({levels, comparisons, magnitudes}) {
            Object.assign(this, {levels, comparisons, magnitudes});
            const colourOf = (...pair) => levels[klora.codeOf(levels, ...pair)].colour;
            this.colours = {subject: colourOf(1, 0), style: colourOf(0, 1)};
            this.wide = false;
            this.axis = element("canvas", {class: "klora-axis", "aria-hidden": "true"});
            this.cells = element("canvas", {class: "klora-cells", tabindex: "0", role: "img"});
            this.chart = element("canvas", {class: "klora-chart", role: "img"});
            this.scroller = element("div", {class: "klora-scroller"}, this.cells);
            this.body = element("div", {class: "klora-map-body"}, this.axis, this.scroller, this.chart);
            this.tip = element("div", {class: "klora-tip", role: "status", hidden: true});
            this.legend = element("div", {class: "klora-legend"});
            this.text = element("div", {class: "klora-text"});
            const summary = element("summary", {}, "The map as text");
            const asText = element("details", {class: "klora-as-text"}, summary, this.text);
            this.root = element("div", {class: "klora-map"}, this.body, this.tip, this.legend, asText);
            this.cells.addEventListener("pointermove", event => this.pointAt(event));
            this.cells.addEventListener("pointerdown", event => this.pointAt(event));
            this.cells.addEventListener("pointerleave", () => this.leave());
            this.cells.addEventListener("blur", () => this.leave());
            this.cells.addEventListener("keydown", event => this.step(event));
            new ResizeObserver(() => {
                const width = this.root.clientWidth;
                if (this.view && width && width !== this.drawnFor) this.draw();
            }).observe(this.root);
        }

        /**
         * @param view {pair, rows, s, method, gamma, names: {subject, style}}; s is null if it is not known
         */
        show(view) {
            this.view = view;
            this.pointed = null;
            this.tip.hidden = true;
            if (this.root.clientWidth) this.draw();
            this.drawLegend();
            this.writeText();
        }

        draw() {
            const {pair, rows} = this.view, width = this.root.clientWidth;
            this.drawnFor = width;
            this.root.classList.toggle("klora-narrow", width < NARROW);
            const style = getComputedStyle(this.root);
            this.ink = style.color;
            this.paper = style.getPropertyValue("--klora-paper").trim() || "#fff";
            this.faint = style.getPropertyValue("--klora-faint").trim() || "#888";
            const available = (width < NARROW ? 0 : width - AXIS - CHART - 15) - gaps(pair.layers);
            const share = available / pair.layers.name.length;
            const fitting = share >= 2 ? Math.min(MOST_CELL, Math.floor(share)) : share;
            this.cell = this.wide ? Math.max(fitting, WIDE_CELL) : fitting >= LEAST_CELL ? fitting : 1;
            this.row = Math.max(LEAST_ROW, Math.min(MOST_ROW, Math.floor(HEIGHT / rows.length)));
            this.layout = layOut(pair.layers, this.cell);
            this.height = TOP + this.row * rows.length + (this.wide ? NAMES : BELOW);
            this.drawAxis();
            this.drawCells();
            this.drawChart();
        }

        topOf(step) {
            return TOP + step * this.row;
        }

        drawAxis() {
            const {rows} = this.view, context = canvasOf(this.axis, AXIS, this.height);
            const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find(n => n * this.row >= 15) || rows.length;
            context.fillStyle = this.ink;
            context.textAlign = "right";
            for (let step = 0; step < rows.length; step += every) {
                context.fillText(String(step), AXIS - 6, this.topOf(step) + this.row / 2);
            }
            context.fillText("step", AXIS - 6, TOP - 12);
        }

        drawCells() {
            const {pair, rows} = this.view, {cell, row} = this;
            const {columns, groups, blocks, width} = this.layout;
            const context = canvasOf(this.cells, width, this.height, cell);
            // Layers narrower than a pixel add up to their mean colour.
            context.globalCompositeOperation = "lighter";
            for (const {layer, left} of columns) {
                for (let first = 0, step = 1; step <= rows.length; step++) {
                    if (step < rows.length && rows[step][layer] === rows[first][layer]) continue;
                    if (rows[first][layer] !== klora.NOT_RUN) {
                        context.fillStyle = this.levels[rows[first][layer]].colour;
                        context.fillRect(left, this.topOf(first), cell, (step - first) * row);
                    }
                    first = step;
                }
            }
            context.globalCompositeOperation = "source-over";
            const ran = rows.map(one => one[0] !== klora.NOT_RUN);
            context.fillStyle = hatch(context, this.paper);
            context.globalAlpha = 0.65;
            for (const {layer, left} of columns) {
                if (!pair.layers.only[layer]) continue;
                ran.forEach((did, step) => did && context.fillRect(left, this.topOf(step), cell, row));
            }
            context.globalAlpha = 1;
            this.markBlank(context, ran, width);
            if (row >= 8) {
                context.fillStyle = this.paper;
                context.globalAlpha = 0.35;
                for (let step = 1; step < rows.length; step++) {
                    context.fillRect(0, this.topOf(step) - 0.5, width, 1);
                }
                context.globalAlpha = 1;
            }
            this.nameSpans(context, groups, blocks);
            this.markPointed(context);
        }

        markBlank(context, ran, width) {
            ran.forEach((did, step) => {
                if (did) return;
                context.strokeStyle = this.faint;
                context.setLineDash([2, 3]);
                context.beginPath();
                context.moveTo(0, this.topOf(step) + this.row / 2);
                context.lineTo(width, this.topOf(step) + this.row / 2);
                context.stroke();
                context.setLineDash([]);
            });
        }

        nameSpans(context, groups, blocks) {
            const bottom = this.topOf(this.view.rows.length);
            context.textAlign = "center";
            let taken = -1;
            for (const {name, left, right} of groups) {
                const middle = (left + right) / 2, half = context.measureText(name).width / 2;
                context.fillStyle = this.faint;
                context.fillRect(left, TOP - 5, right - left, 1);
                if (middle - half < taken) continue;
                context.fillStyle = this.ink;
                context.fillText(name, Math.max(half, middle), TOP - 14);
                taken = middle + half + 4;
            }
            taken = -1;
            for (const {name, left, right} of blocks) {
                const number = name.replace(/^\D+/, "");
                const middle = (left + right) / 2, half = context.measureText(number).width / 2;
                context.fillStyle = this.faint;
                context.fillRect(left, bottom + 4, right - left, 1);
                if (!number || middle - half < taken) continue;
                context.fillStyle = this.ink;
                context.fillText(number, middle, bottom + 13);
                taken = middle + half + 3;
            }
            context.textAlign = "left";
            context.fillStyle = this.faint;
            if (!this.wide) {
                context.fillText("blocks, in the order of the network", 0, bottom + 32);
                return;
            }
            context.fillStyle = this.ink;
            context.font = "10px system-ui, sans-serif";
            for (const {layer, left} of this.layout.columns) {
                context.save();
                context.translate(left + this.cell / 2, bottom + 24);
                context.rotate(Math.PI / 2);
                context.fillText(this.shortName(layer), 0, 0);
                context.restore();
            }
        }

        shortName(layer) {
            const {layers} = this.view.pair, numbered = /\d$/.test(layers.block[layer]);
            const name = layers.name[layer].split(".").slice(numbered ? 2 : 1).join(".");
            return name.replace(/transformer_blocks\./g, "").replace(/^(\d+)\.(\d+)\./, "$1.$2 ");
        }

        markPointed(context) {
            if (!this.pointed) return;
            const {column, step} = this.pointed;
            context.strokeStyle = this.ink;
            context.lineWidth = 1;
            const height = this.row * this.view.rows.length;
            context.strokeRect(column.left - 0.5, TOP - 0.5, this.cell + 1, height + 1);
            context.strokeRect(-0.5, this.topOf(step) - 0.5, this.layout.width + 1, this.row + 1);
        }

        /** S(t) over the steps, the steps where it passes 1, and bars for the subject's share. */
        drawChart() {
            const {rows, s, method} = this.view, bottom = this.topOf(rows.length);
            const context = canvasOf(this.chart, CHART, this.height);
            const bars = CURVE + 8, barWidth = CHART - bars - 2;
            context.fillStyle = this.ink;
            context.textAlign = "right";
            context.fillText("subject", bars + barWidth, TOP - 14);
            context.textAlign = "left";
            rows.forEach((row, step) => {
                const shares = klora.sharesOf(row, this.levels);
                if (shares === null) return;
                const height = Math.max(1, this.row - (this.row > 5 ? 1 : 0));
                context.fillStyle = this.colours.style;
                context.fillRect(bars, this.topOf(step), (shares.subject + shares.style) * barWidth, height);
                context.fillStyle = this.colours.subject;
                context.fillRect(bars, this.topOf(step), shares.subject * barWidth, height);
            });
            context.fillStyle = this.ink;
            context.fillText("0", bars, bottom + 13);
            context.textAlign = "right";
            context.fillText("100%", bars + barWidth, bottom + 13);
            const shareAt = row => percent(klora.subjectShare(row, this.levels));
            const summary = "Subject's share of the layers: " +
                `${shareAt(rows[0])} at the first step, ${shareAt(rows[rows.length - 1])} at the last.`;
            this.chart.setAttribute("aria-label", summary);
            if (s) this.drawCurve(context, s, bottom, Boolean((this.comparisons[method] || {}).s));
        }

        drawCurve(context, s, bottom, inUse) {
            const ratio = this.pointed ? this.ratioOf(this.pointed.column.layer) : null;
            const low = Math.min(0, ...s), high = Math.max(1.25, ...s) * 1.05, left = 2, right = CURVE - 8;
            const within = value => Math.min(high, Math.max(low, value));
            const across = value => left + (within(value) - low) / (high - low) * (right - left);
            const middle = step => this.topOf(step) + this.row / 2;
            context.strokeStyle = context.fillStyle = this.faint;
            context.lineWidth = 1;
            context.strokeRect(left + 0.5, TOP + 0.5, right - left, bottom - TOP - 1);
            context.setLineDash([3, 3]);
            context.beginPath();
            context.moveTo(across(1), TOP);
            context.lineTo(across(1), bottom);
            context.stroke();
            context.setLineDash([]);
            context.fillStyle = this.ink;
            context.textAlign = "center";
            context.fillText(inUse ? "S(t)" : "S(t) unused", (left + right) / 2, TOP - 14);
            context.fillText("1", across(1), bottom + 13);
            context.globalAlpha = inUse ? 1 : 0.4;
            context.strokeStyle = this.ink;
            context.lineWidth = 2;
            context.beginPath();
            const changes = [...s].map((value, step) => step ? value - s[step - 1] : 0);
            const ups = changes.filter(change => change > 0), downs = changes.filter(change => change < 0);
            const rises = ups.length >= downs.length;
            s.forEach((value, step) => {
                const wraps = changes[step] !== 0 && (changes[step] > 0) !== rises;
                context[step && !wraps ? "lineTo" : "moveTo"](across(value), middle(step));
            });
            context.stroke();
            if (inUse) {
                for (const step of this.crossings(s, 1)) {
                    this.dot(context, across(s[step]), middle(step), this.ink);
                }
                if (ratio !== null) this.drawRatio(context, s, ratio, across, middle, bottom);
            }
            context.globalAlpha = 1;
        }

        drawRatio(context, s, ratio, across, middle, bottom) {
            context.strokeStyle = this.colours.subject;
            context.lineWidth = 1.5;
            context.beginPath();
            context.moveTo(across(ratio), TOP);
            context.lineTo(across(ratio), bottom);
            context.stroke();
            for (const step of this.crossings(s, ratio)) {
                this.dot(context, across(s[step]), middle(step), this.colours.subject);
            }
        }

        /** The steps at which S(t) has passed a level since the previous step. */
        crossings(s, level) {
            return [...s.keys()].filter(step => step > 0 && (s[step] <= level) !== (s[step - 1] <= level));
        }

        dot(context, x, y, colour) {
            context.fillStyle = colour;
            context.strokeStyle = this.paper;
            context.lineWidth = 1.5;
            context.beginPath();
            context.arc(x, y, 4.5, 0, 2 * Math.PI);
            context.fill();
            context.stroke();
        }

        /**
         * {words, subject, style, ratio} of what the method compares in a layer, or of the first magnitude if
         * it compares none; null if only one LoRA changes the layer.
         */
        comparedOn(layer) {
            const {pair, method} = this.view, {layers} = pair;
            if (layers.only[layer]) return null;
            const field = (this.comparisons[method] || {}).magnitude || Object.keys(this.magnitudes)[0];
            const words = this.magnitudes[field].replace("{k}", layers.k[layer]);
            const {subject, style, ratio} = pair.magnitudes[field];
            return {words, subject: subject[layer], style: style[layer], ratio: ratio[layer]};
        }

        ratioOf(layer) {
            const {gamma} = this.view, found = this.comparedOn(layer);
            return found && gamma && found.style ? found.ratio / gamma : null;
        }

        pointAt(event) {
            const box = this.cells.getBoundingClientRect();
            const x = event.clientX - box.left, step = Math.floor((event.clientY - box.top - TOP) / this.row);
            const column = this.layout && this.layout.columns.findLast(one => one.left <= x);
            const inside = step >= 0 && step < this.view.rows.length;
            if (!inside || !column || x > column.left + this.cell + GROUP_GAP) {
                this.leave();
                return;
            }
            this.point(column, step);
        }

        step(event) {
            const moves = {
                ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
                PageUp: [-20, 0], PageDown: [20, 0],
            }[event.key];
            if (event.key === "Escape") this.leave();
            if (!moves || !this.layout) return;
            event.preventDefault();
            const {columns} = this.layout, limit = (value, count) => Math.max(0, Math.min(count - 1, value));
            const {pointed} = this;
            const at = pointed ? [columns.indexOf(pointed.column), pointed.step] : [-moves[0], -moves[1]];
            const column = columns[limit(at[0] + moves[0], columns.length)];
            this.scroller.scrollLeft = column.left - this.scroller.clientWidth / 2;
            this.point(column, limit(at[1] + moves[1], this.view.rows.length));
        }

        point(column, step) {
            if (this.pointed && this.pointed.column === column && this.pointed.step === step) return;
            this.pointed = {column, step};
            this.drawCells();
            this.drawChart();
            this.tip.replaceChildren(...this.tipLines(column.layer, step));
            this.tip.hidden = false;
            this.placeTip(column, step);
        }

        placeTip(column, step) {
            const root = this.root.getBoundingClientRect(), cells = this.cells.getBoundingClientRect();
            const x = cells.left - root.left + column.left, y = cells.top - root.top + this.topOf(step);
            const width = this.tip.offsetWidth;
            const left = x + width + 24 > root.width ? x - width - 12 : x + this.cell + 12;
            this.tip.style.left = `${Math.max(0, Math.min(root.width - width, left))}px`;
            this.tip.style.top = `${y + this.row + 8}px`;
        }

        leave() {
            if (!this.pointed) return;
            this.pointed = null;
            this.tip.hidden = true;
            this.drawCells();
            this.drawChart();
        }

        tipLines(layer, step) {
            const {pair, rows, s, names} = this.view, {layers} = pair, code = rows[step][layer];
            const who = code === klora.NOT_RUN ? "did not run" : this.levels[code].words;
            const swatch = this.swatch(code);
            const lines = [
                element("b", {}, layers.name[layer]),
                element("div", {}, swatch, `step ${step}: ${who}`, s ? `, S = ${short(s[step])}` : ""),
            ];
            const found = this.comparedOn(layer), ratio = this.ratioOf(layer);
            const say = sentence => lines.push(element("div", {}, sentence));
            if (found) {
                say(`${found.words}: subject ${short(found.subject)}, style ${short(found.style)}`);
                if (ratio !== null) say(`ratio subject ÷ γ · style: ${short(ratio)}`);
            } else {
                say(`Only ${names[layers.only[layer]]} changes this layer.`);
            }
            const ran = one => rows[one][layer] !== klora.NOT_RUN;
            const switches = klora.switchesOf(rows, layer).filter(one => ran(one) && ran(one - 1));
            const few = switches.slice(0, 6).join(", ") + (switches.length > 6 ? ", …" : "");
            say(switches.length ? `switches at step ${few}` : "never switches");
            return lines;
        }

        swatch(code) {
            const blank = code === klora.NOT_RUN ? " klora-blank" : "";
            const made = element("span", {class: `klora-swatch${blank}`});
            if (code !== klora.NOT_RUN) made.style.background = this.levels[code].colour;
            return made;
        }

        drawLegend() {
            const {pair, rows, names} = this.view, {levels} = this;
            const entry = (swatch, text) => element("span", {}, swatch, text);
            const subject = klora.codeOf(levels, 1, 0), style = klora.codeOf(levels, 0, 1);
            const has = code => rows.some(row => row.includes(code));
            const mixed = [...levels.keys()].filter(code => code !== subject && code !== style && has(code));
            const hatched = element("span", {class: "klora-swatch klora-hatched"});
            this.legend.replaceChildren(...[
                entry(this.swatch(subject), `subject: ${names.subject}`),
                entry(this.swatch(style), `style: ${names.style}`),
                ...mixed.reverse().map(code => entry(this.swatch(code), levels[code].words)),
                pair.layers.only.some(Boolean) ? entry(hatched, "only one LoRA changes this layer") : null,
                has(klora.NOT_RUN) ? entry(this.swatch(klora.NOT_RUN), "did not run") : null,
            ].filter(Boolean));
        }

        writeText() {
            const {pair, rows} = this.view, layers = [...pair.layers.name.keys()];
            const steps = [...rows.keys()].filter(step => rows[step][0] !== klora.NOT_RUN);
            const shown = steps.map(step => rows[step]), last = Math.max(0, shown.length - 1);
            const marks = [...new Set([0, Math.round(last / 3), Math.round(2 * last / 3), last])];
            const share = (row, members) => klora.subjectShare(row, this.levels, members);
            const mean = shown.reduce((sum, row) => sum + share(row), 0) / (shown.length || 1);
            const at = place => percent(share(shown[place]));
            const ends = shown.length ? `, ${at(0)} at the first step and ${at(last)} at the last` : "";
            const never = layers.filter(layer => !klora.switchesOf(shown, layer).length).length;
            const size = `${shown.length} of ${rows.length} steps, ${layers.length} layers`;
            const parts = `The subject has ${percent(mean)} of the layers over the run${ends}`;
            this.summary = `${size}. ${parts}; ${never} layers never switch.`;
            const keys = "The arrow keys move from layer to layer and from step to step.";
            this.cells.setAttribute("aria-label", `Selection map. ${this.summary} ${keys}`);
            const head = element("tr", {}, element("th", {}, "block"), element("th", {}, "layers"),
                ...marks.map(mark => element("th", {}, `step ${steps[mark] ?? 0}`)));
            const cell = (mark, members) => shown[mark] ? percent(share(shown[mark], members)) : "–";
            const body = layOut(pair.layers, 1).blocks.map(({name, layers: members}) => element("tr", {},
                element("th", {scope: "row"}, name), element("td", {}, String(members.length)),
                ...marks.map(mark => element("td", {}, cell(mark, members)))));
            const caption = element("caption", {}, "The subject's share of each block's layers");
            this.text.replaceChildren(element("p", {}, this.summary),
                element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...body)));
        }
    }

    Object.assign(klora, {SelectionMap, element, percent, short});
})(globalThis.klora = globalThis.klora || {});
