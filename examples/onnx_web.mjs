// Run an exported ONNX detector in the browser (or Node.js) with onnxruntime-web.
//
//   import * as ort from "onnxruntime-web";
//   const session = await ort.InferenceSession.create("best.onnx");
//   const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
//   const detections = await detect(ort, session, pixels, 640);

/** Return [{cls, score, box: [x1, y1, x2, y2]}] in pixels of the image, best first, after NMS per class.
 *
 * image: an ImageData, or an object with `data` (RGBA bytes), `width` and `height`; side: of the exported input.
 */
export async function detect(ort, session, image, side, confidence = 0.25, maxIou = 0.45) {
  const scale = side / Math.max(image.width, image.height);
  const input = new ort.Tensor("float32", letterbox(image, side, scale), [1, 3, side, side]);
  const { output0 } = await session.run({ images: input });
  const [, count, columns] = output0.dims; // rows: cx, cy, w, h in pixels, objectness, class probabilities
  const found = [];
  for (let i = 0; i < count; i++) {
    const row = output0.data.subarray(i * columns, (i + 1) * columns);
    let cls = 0;
    for (let k = 1; k < columns - 5; k++) if (row[5 + k] > row[5 + cls]) cls = k;
    const score = row[4] * row[5 + cls];
    if (score <= confidence) continue;
    const [cx, cy, w, h] = row;
    found.push({ cls, score, box: [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2].map((v) => v / scale) });
  }
  found.sort((a, b) => b.score - a.score);
  const kept = [];
  for (const one of found) {
    if (kept.every((other) => other.cls !== one.cls || iou(other.box, one.box) <= maxIou)) kept.push(one);
  }
  return kept;
}

/** Return planar RGB in [0, 1]: bilinear resizing, gray padding on the right or below. */
function letterbox({ data, width, height }, side, scale) {
  const planes = new Float32Array(3 * side * side).fill(114 / 255);
  const columns = Math.round(width * scale), rows = Math.round(height * scale);
  for (let y = 0; y < rows; y++) {
    const sy = Math.min(Math.max((y + 0.5) / scale - 0.5, 0), height - 1);
    const y0 = Math.floor(sy), y1 = Math.min(y0 + 1, height - 1), fy = sy - y0;
    for (let x = 0; x < columns; x++) {
      const sx = Math.min(Math.max((x + 0.5) / scale - 0.5, 0), width - 1);
      const x0 = Math.floor(sx), x1 = Math.min(x0 + 1, width - 1), fx = sx - x0;
      for (let c = 0; c < 3; c++) {
        const at = (yy, xx) => data[4 * (yy * width + xx) + c];
        const top = at(y0, x0) * (1 - fx) + at(y0, x1) * fx;
        const bottom = at(y1, x0) * (1 - fx) + at(y1, x1) * fx;
        planes[c * side * side + y * side + x] = (top * (1 - fy) + bottom * fy) / 255;
      }
    }
  }
  return planes;
}

/** Return the intersection over union of two boxes [x1, y1, x2, y2]. */
function iou(a, b) {
  const w = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), h = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (w <= 0 || h <= 0) return 0;
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (w * h) / (area(a) + area(b) - w * h);
}
