"use strict";
(async () => {
  const state = document.getElementById("state");
  const rows = [...document.querySelectorAll("#nodules tbody tr")];
  const scene = JSON.parse(document.getElementById("data").textContent);
  const { Niivue, NVImage, NVMesh, SLICE_TYPE, SHOW_RENDER } = window.niivue;
  const ORANGE = [255, 176, 0, 255];
  const CHOSEN = [255, 92, 168, 255];
  const LUNGS = [200, 215, 230, 255];

  if (!document.createElement("canvas").getContext("webgl2")) {
    state.textContent = "This browser has no WebGL 2, which the viewer needs. Table and pictures say the same.";
    return;
  }
  document.getElementById("views").hidden = false;

  const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;
  const range = () => document.getElementById("window").value.split(" ").map(Number);
  const viewOf = async (id, options) => {
    const view = new Niivue({
      logLevel: "silent",
      dragAndDropEnabled: false,
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      loadingText: "",
      ...options,
    });
    await view.attachToCanvas(document.getElementById(id), true);
    return view;
  };
  const slices = {
    sliceType: SLICE_TYPE.MULTIPLANAR,
    multiplanarShowRender: SHOW_RENDER.NEVER,
    crosshairColor: [1, 0.69, 0, 0.6],
    crosshairGap: 8,
    crosshairWidth: 0.5,
    scrollRequiresFocus: true,
  };

  const showImages = async (view, images, name) => {
    [...view.volumes].reverse().forEach((old) => view.removeVolume(old));
    const [cal_min, cal_max] = range();
    view.addVolume(await NVImage.loadFromBase64({ base64: images.image, name: `${name}.nii.gz`, cal_min, cal_max }));
    const labels = await NVImage.loadFromBase64({ base64: images.labels, name: `${name}-nodules.nii.gz` });
    labels.setColormapLabel({ R: [0, 255], G: [0, 176], B: [0, 0], A: [0, 255], I: [0, 1], labels: ["", "nodule"] });
    view.addVolume(labels);
    showMarks(view);
  };
  const showMarks = (view) => {
    if (view.volumes.length > 1) view.setOpacity(1, document.getElementById("marks").checked ? 0.4 : 0);
  };
  const moveTo = (view, mm) => {
    view.scene.crosshairPos = view.mm2frac(mm);
    view.drawScene();
  };

  const scan = await viewOf("scan", slices);
  await showImages(scan, scene.overview, "scan");
  const close = await viewOf("close", slices);
  const surfaces = await viewOf("surfaces", { backColor: [0.06, 0.07, 0.09, 1] });
  const meshOf = async (base64, name, opacity, colour) => {
    const mesh = await NVMesh.readMesh(bytes(base64), `${name}.mz3`, surfaces.gl, opacity, new Uint8Array(colour));
    surfaces.addMesh(mesh);
    return mesh;
  };
  const meshes = [];
  for (const [number, nodule] of scene.nodules.entries()) {
    meshes.push(await meshOf(nodule.surface, `nodule ${number}`, 1, ORANGE));
  }
  const lungs = scene.lungs ? await meshOf(scene.lungs, "lungs", 0.35, LUNGS) : null;
  surfaces.setRenderAzimuthElevation(180, 10);

  const paint = (mesh, rgba255) => mesh && surfaces.setMeshProperty(mesh.id, "rgba255", new Uint8Array(rgba255));
  let chosen = null;
  const choose = async (number) => {
    rows.forEach((row, at) => {
      row.classList.toggle("chosen", at === number);
      row.querySelector("button").setAttribute("aria-pressed", at === number);
    });
    if (chosen !== null) paint(meshes[chosen], ORANGE);
    paint(meshes[number], CHOSEN);
    chosen = number;
    const label = rows[number].querySelector("button").textContent;
    document.getElementById("close-title").textContent = `Nodule ${label}`;
    moveTo(scan, scene.centres[number]);
    await showImages(close, scene.nodules[number] || scene.overview, `nodule ${label}`);
    moveTo(close, scene.centres[number]);
    state.textContent = `Nodule ${label} is shown.`;
  };
  // One after the other: a click must not overtake the one before it.
  let last = Promise.resolve();
  rows.forEach((row, number) => row.addEventListener("click", () => (last = last.then(() => choose(number)))));

  document.getElementById("window").addEventListener("change", () => {
    for (const view of [scan, close]) {
      if (!view.volumes.length) continue;
      [view.volumes[0].cal_min, view.volumes[0].cal_max] = range();
      view.updateGLVolume();
    }
  });
  document.getElementById("marks").addEventListener("change", () => [scan, close].forEach(showMarks));
  document.getElementById("lungs").addEventListener("change", (event) => {
    if (lungs) surfaces.setMeshProperty(lungs.id, "visible", event.target.checked);
  });

  const STEPS = {
    ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };
  for (const view of [scan, close, surfaces]) {
    view.canvas.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault();
      const { renderAzimuth, renderElevation } = view.scene;
      if (view === surfaces) view.setRenderAzimuthElevation(renderAzimuth + 5 * step[0], renderElevation + 5 * step[1]);
      else view.moveCrosshairInVox(...step);
    });
  }
  if (rows.length) await choose(0);
  else document.getElementById("close").closest("figure").remove();
  if (!rows.length) state.textContent = "The whole scan is shown.";
})().catch((error) => {
  document.getElementById("state").textContent = `The viewer does not run here (${error.message}). Table and pictures say the same.`;
});
