import Checkpoints
import Foundation
import Merging

/// The report of a calibration as a page, or as one picture, complete in one file.
struct CalibrationPage {
  let mixture: String
  let reports: [MixtureCalibration.LayerReport]
  let choice: ScalingChoice?

  func write(to path: String) throws {
    let text = path.hasSuffix(".svg") ? svg : html
    do { try Data(text.utf8).write(to: URL(filePath: path), options: .atomic) } catch {
      throw CheckpointError(file: path, "cannot be written: \(error.localizedDescription)")
    }
  }

  private var html: String {
    """
    <!DOCTYPE html>
    <html lang="en">
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>Routers, calibrated</title>
    <style>
    \(DisentanglementPage.style)
    </style>
    <main>
    <h1>Routers, calibrated</h1>
    <p><code>\(escaped(mixture))</code></p>
    \(svg)
    </main>
    </html>

    """
  }

  /// What is drawn below each other.
  private var panels: [BarPanel] {
    let names = reports.map { $0.module }
    let accuracies = BarPanel(
      title: "Held-out samples routed to their own expert, in %: before (pale) and after",
      bars: zip(names, reports).map { name, report in
        (name, 100 * report.routingAccuracy.before, 100 * report.routingAccuracy.after)
      }, digits: 1)
    let errors = BarPanel(
      title: "Error of the outputs against the expert's, the base model's being 1",
      bars: zip(names, reports).compactMap { name, report in
        report.outputError.map { (name, $0.before, $0.after) }
      }, digits: 3)
    let trials = BarPanel(
      title: "Error of the whole model's outputs for each λ of the static part",
      bars: choice?.trials.map { ("λ \(decimal(Double($0.scaling), 1))", .nan, $0.outputError) }
        ?? [], digits: 3)
    return [accuracies, errors, trials].filter { !$0.bars.isEmpty }
  }

  var svg: String {
    let label = panels.map { Grid.labelWidth($0.bars.map { $0.name }) }.max() ?? 0
    var y = 0
    var parts: [String] = []
    for panel in panels {
      parts.append(panel.svg(label: label, top: y))
      y += panel.height
    }
    let width = label + 560
    return """
      <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 \(width) \(y)" width="\(width)" height="\(y)" role="img">
      <style>\(DisentanglementPage.style.replacingOccurrences(of: "body {", with: "svg { background: var(--page); } body {"))
      text { font-family: system-ui, sans-serif; } .title { font-weight: 600; }</style>
      \(parts.joined(separator: "\n"))
      </svg>
      """
  }
}

/// A title and a bar for each name: what was, pale and broad, and what is.
struct BarPanel {
  let title: String
  /// Values that are not numbers are not drawn.
  let bars: [(name: String, before: Double, after: Double)]
  let digits: Int

  private static let row = 22
  private static let header = 34

  var height: Int { Self.header + bars.count * Self.row + 14 }

  func svg(label: Int, top: Int) -> String {
    let largest = bars.flatMap { [$0.before, $0.after] }.filter { $0.isFinite }.max() ?? 1
    let scale = 400 / max(1e-9, largest)
    func length(_ value: Double) -> String {
      decimal(value.isFinite ? max(0, scale * value) : 0, 1)
    }
    func text(_ value: Double) -> String { value.isFinite ? decimal(value, digits) : "" }
    var lines = ["<text class=\"title\" x=\"8\" y=\"\(top + 20)\">\(escaped(title))</text>"]
    for (index, bar) in bars.enumerated() {
      let y = top + Self.header + index * Self.row
      let arrow = bar.before.isFinite && bar.after.isFinite ? " → " : ""
      lines.append(
        """
        <text x="\(label - 8)" y="\(y + 15)" text-anchor="end">\(escaped(bar.name))</text>\
        <rect x="\(label)" y="\(y + 2)" width="\(length(bar.before))" height="18" class="same" fill-opacity="0.25"/>\
        <rect x="\(label)" y="\(y + 6)" width="\(length(bar.after))" height="10" class="same"/>\
        <text x="\(label + 408)" y="\(y + 15)">\(text(bar.before))\(arrow)\(text(bar.after))</text>
        """)
    }
    let first = top + Self.header
    lines.append(
      "<path class=\"axis\" d=\"M\(label) \(first) V\(first + bars.count * Self.row)\"/>")
    return lines.joined(separator: "\n")
  }
}
